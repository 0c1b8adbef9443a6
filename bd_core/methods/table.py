"""Every merging method there is, in the order of the table: data-free, then by what it needs."""

from bd_core.methods.ace import ace
from bd_core.methods.adamerging import adamerging
from bd_core.methods.averages import task_arithmetic, weight_average
from bd_core.methods.bmm import bmm
from bd_core.methods.dare import dare
from bd_core.methods.doge import doge
from bd_core.methods.iso_c import iso_c
from bd_core.methods.lot import lot
from bd_core.methods.model_stock import model_stock
from bd_core.methods.pareto_map import pareto_map
from bd_core.methods.pcb import pcb
from bd_core.methods.registry import Method
from bd_core.methods.regmean import regmean
from bd_core.methods.robust_merge import robust_merge
from bd_core.methods.surgery import surgery
from bd_core.methods.ties import ties
from bd_core.methods.tsv_m import tsv_m
from bd_core.methods.twin_merging import twin_merging
from bd_core.methods.wemoe import wemoe
from bd_core.methods.wudi import wudi, wudi_exact

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("weight_average", "Weight average", weight_average, "nothing", "Model Soups, ICML 2022", "one pass"),
        Method(
            "task_arithmetic", "Task Arithmetic", task_arithmetic, "nothing", "Task Arithmetic, ICLR 2023", "one pass"
        ),
        Method("ties", "Ties-Merging", ties, "nothing", "TIES-Merging, NeurIPS 2023", "two passes"),
        Method("dare", "DARE", dare, "nothing", "DARE, ICML 2024", "one pass, or as Ties"),
        Method("pcb", "PCB-Merging", pcb, "nothing", "PCB-Merging, NeurIPS 2024", "three passes"),
        Method("model_stock", "Model Stock", model_stock, "nothing", "Model Stock, ECCV 2024", "two passes"),
        Method(
            "doge",
            "DOGE",
            doge,
            "nothing",
            "DOGE (AdaPGD), ICML 2025",
            "K + 1 eigenvalue problems and 400 steps a matrix",
            "matrices",
        ),
        Method(
            "robust_merge",
            "RobustMerge",
            robust_merge,
            "nothing",
            "RobustMerge, NeurIPS 2025",
            "one pass over the factors",
            "tensor",
            experts="adapters",
        ),
        Method(
            "tsv_m",
            "TSV-M",
            tsv_m,
            "nothing",
            "Task Singular Vectors, CVPR 2025",
            "K + 2 eigendecompositions a matrix",
            "matrices",
        ),
        Method(
            "iso_c",
            "Iso-C",
            iso_c,
            "nothing",
            "No Task Left Behind, ICML 2025",
            "an eigendecomposition a matrix",
            "matrices",
        ),
        Method("wudi", "WUDI", wudi, "nothing", "WUDI-Merging, ICML 2025", "300 steps a matrix", "matrices"),
        Method(
            "wudi_exact", "WUDI exact", wudi_exact, "nothing", "ours, of WUDI's loss", "a solve a matrix", "matrices"
        ),
        Method(
            "ace",
            "ACE-Merging",
            ace,
            "nothing",
            "ACE-Merging, arXiv 2603.02945",
            "a solve a matrix, two passes",
            "matrices",
        ),
        Method(
            "regmean",
            "RegMean",
            regmean,
            "unlabelled activations",
            "RegMean, ICLR 2023",
            "a solve a matrix",
            "matrices",
        ),
        Method(
            "lot", "LOT", lot, "unlabelled activations", "LOT Merging, NeurIPS 2025", "a solve a matrix", "matrices"
        ),
        Method(
            "bmm",
            "Bayesian Model Merging",
            bmm,
            "unlabelled activations",
            "BMM, arXiv 2605.12843",
            "the anchor's and a solve a matrix",
            "matrices",
        ),
        Method(
            "adamerging",
            "AdaMerging",
            adamerging,
            "unlabelled batches",
            "AdaMerging, ICLR 2024",
            "500 steps of every task's forward and backward",
            "model",
            "fit",
        ),
        Method(
            "surgery",
            "Representation Surgery",
            surgery,
            "unlabelled batches",
            "Representation Surgery, ICML 2024",
            "500 steps of forward passes, the merged model's and every expert's",
            "model",
            "per sample",
        ),
        Method(
            "map",
            "MAP",
            pareto_map,
            "labelled validation",
            "MAP, ICLR 2025",
            "(K + 1)(K + 2) merges and validations",
            "model",
            "fit",
        ),
        Method(
            "twin_merging",
            "Twin-Merging",
            twin_merging,
            "task labels",
            "Twin-Merging, NeurIPS 2024",
            "an SVD a matrix, a router",
            "model",
            "per sample",
        ),
        Method(
            "wemoe",
            "WEMoE",
            wemoe,
            "unlabelled batches",
            "WEMoE, ICML 2024",
            "1000 steps of every task's forward and backward, per sample",
            "model",
            "per sample",
        ),
    )
}
