// The kernels for few samples. There reading W_0 and tau takes most of the time: they are read once, row by row, into
// merged tiles, and not packed. Asking for lines ahead of time was measured and made it slower: rows run long enough.

#pragma once
#include "cpu_parts.h"

static const n_t FEW = 4;           // samples at most
static const n_t FEW_OUTPUTS = 32;  // forward: rows of a block, a multiple of PANEL
static const n_t FEW_DEPTH = 192;   // forward: columns of a block
static const n_t FEW_ROWS = 24;     // backward: rows of a block

// backward: columns of a block, a multiple of PANEL
static constexpr n_t few_columns(int Q) { return Q == 1 ? 192 : 128; }

// One row of Q tiles, W_0 + sum_k w_qk tau_k; PANEL elements lie together, the next PANEL `panel_stride` further
template <int Q, class E>
static inline void form_row(float* tile, n_t tile_size, n_t panel_stride, const float* base, const E* tau, n_t k_stride,
                            const float* w, n_t K, n_t n) {
    n_t i = 0;
    for (; i + PANEL <= n; i += PANEL, tile += panel_stride) {
        vec acc[Q][2];
        for (int q = 0; q < Q; ++q) acc[q][0] = load(base + i), acc[q][1] = load(base + i + VL);
        for (n_t k = 0; k < K; ++k) {
            const E* from = tau + k * k_stride + i;
            vec v0 = load(from), v1 = load(from + VL);
            for (int q = 0; q < Q; ++q) acc[q][0] += w[q * K + k] * v0, acc[q][1] += w[q * K + k] * v1;
        }
        for (int q = 0; q < Q; ++q) store(tile + q * tile_size, acc[q][0]), store(tile + q * tile_size + VL, acc[q][1]);
    }
    for (n_t j = 0; i + j < n; ++j)
        for (int q = 0; q < Q; ++q) {
            float value = base[i + j];
            for (n_t k = 0; k < K; ++k) value = __builtin_fmaf(w[q * K + k], number(tau[k * k_stride + i + j]), value);
            tile[q * tile_size + j] = value;
        }
}

// y [Q, T, O]
template <int Q, class E>
static void few_forward(const float* x, const float* w, const float* base, const E* tau, const float* bias, float* y,
                        n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    const n_t depth = blocks(I, blocks(I, FEW_DEPTH)), n_blocks = blocks(O, FEW_OUTPUTS);
    const n_t size = FEW_OUTPUTS * depth;  // of a tile
#pragma omp parallel
    {
        std::vector<float> room(size * 2 * Q + T * (depth + Q * FEW_OUTPUTS) + LINE);
        float *formed = aligned(room), *tile = formed + size * Q, *sums = tile + size * Q;
        float* near = sums + Q * T * FEW_OUTPUTS;
#pragma omp for schedule(static)
        for (n_t block = 0; block < n_blocks; ++block) {
            const n_t o = block * FEW_OUTPUTS, height = least(FEW_OUTPUTS, O - o), panels = blocks(height, PANEL);
            // sums [Q, panels, T, PANEL]
            for (n_t at = 0, q = 0; q < Q; ++q)
                for (n_t p = 0; p < panels; ++p)
                    for (n_t t = 0; t < T; ++t, at += PANEL) {
                        const n_t n = least(PANEL, height - p * PANEL);
                        std::memset(sums + at, 0, sizeof(float) * PANEL);
                        if (bias) copy(sums + at, bias + q * O + o + p * PANEL, n);
                    }
            for (n_t i = 0; i < I; i += depth) {
                const n_t n = least(depth, I - i);
                for (n_t r = 0; r < height; ++r)
                    form_row<Q>(formed + r * n, size, PANEL, base + (o + r) * I + i, tau + (o + r) * I + i, k_stride, w,
                                K, n);
                for (n_t q = 0; q < Q; ++q) {
                    pack(tile + q * size, formed + q * size, 1, n, n, height);
                    n_t row = I;
                    const float* a = close_rows(x + q * T * I + i, &row, T, n, near);
                    for (n_t p = 0; p < panels; ++p)
                        panel(a, row, 1, tile + q * size + p * n * PANEL, PANEL, n, sums + (q * panels + p) * T * PANEL,
                              PANEL, T);
                }
            }
            for (n_t q = 0; q < Q; ++q)
                for (n_t p = 0; p < panels; ++p)
                    for (n_t t = 0; t < T; ++t)
                        copy(y + (q * T + t) * O + o + p * PANEL, sums + ((q * panels + p) * T + t) * PANEL,
                             least(PANEL, height - p * PANEL));
        }
    }
}

// dw [Q, K] += <dtile_q, tau_k>; dtile [panels, n_rows, PANEL], edges of width zero
template <int Q, class E>
static void few_contract(const float* dtile, n_t tile_size, const E* tau, n_t row, n_t k_stride, n_t K, n_t n_rows,
                         n_t width, float* dw) {
    const n_t whole = width / PANEL * PANEL;
    for (n_t k = 0; k < K; ++k) {
        vec acc[Q][2] = {};
        float rest[Q] = {};
        for (n_t r = 0; r < n_rows; ++r) {
            const E* from = tau + k * k_stride + r * row;
            const float* with = dtile + r * PANEL;
            for (n_t j = 0; j < whole; j += PANEL, with += n_rows * PANEL) {
                vec v0 = load(from + j), v1 = load(from + j + VL);
                for (int q = 0; q < Q; ++q)
                    acc[q][0] += v0 * load(with + q * tile_size), acc[q][1] += v1 * load(with + q * tile_size + VL);
            }
            for (n_t j = whole; j < width; ++j)
                for (int q = 0; q < Q; ++q) rest[q] += number(from[j]) * with[q * tile_size + j - whole];
        }
        for (int q = 0; q < Q; ++q) dw[q * K + k] += sum(acc[q][0] + acc[q][1]) + rest[q];
    }
}

// to [panels, T, PANEL] = from [T, width], zeros beyond the edge
static void to_panels(float* to, const float* from, n_t row, n_t T, n_t width) {
    for (n_t p = 0; p < width; p += PANEL)
        for (n_t t = 0; t < T; ++t, to += PANEL) {
            if (width - p < PANEL) std::memset(to, 0, sizeof(float) * PANEL);
            copy(to, from + t * row + p, least(PANEL, width - p));
        }
}

// dx [Q, T, I] or null; parts [blocks of columns, Q, K] or null
template <int Q, class E>
static void few_backward(const float* x, const float* w, const float* base, const E* tau, const float* dy, float* dx,
                         float* parts, n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    const n_t columns = few_columns(Q), size = columns * FEW_ROWS, wide = T * columns;
#pragma omp parallel
    {
        std::vector<float> room(Q * (size + 2 * wide + T * FEW_ROWS) + LINE);
        float *tile = aligned(room), *xs = tile + Q * size, *sums = xs + Q * wide, *near = sums + Q * wide;
#pragma omp for schedule(dynamic)
        for (n_t block = 0; block < blocks(I, columns); ++block) {
            const n_t i = block * columns, width = least(columns, I - i), panels = blocks(width, PANEL);
            if (dx) std::memset(sums, 0, sizeof(float) * Q * wide);
            for (n_t q = 0; q < Q && parts; ++q) to_panels(xs + q * wide, x + q * T * I + i, I, T, width);
            for (n_t o = 0; o < O; o += FEW_ROWS) {
                const n_t n = least(FEW_ROWS, O - o);
                for (n_t r = 0; r < n && dx; ++r)
                    form_row<Q>(tile + r * PANEL, size, n * PANEL, base + (o + r) * I + i, tau + (o + r) * I + i,
                                    k_stride, w, K, width);
                for (n_t q = 0; q < Q; ++q)
                    for (n_t t = 0; t < T; ++t) copy(near + (q * T + t) * n, dy + (q * T + t) * O + o, n);
                for (n_t q = 0; q < Q && dx; ++q)
                    for (n_t p = 0; p < panels; ++p)
                        panel(near + q * T * n, n, 1, tile + q * size + p * n * PANEL, PANEL, n,
                              sums + q * wide + p * T * PANEL, PANEL, T);
                if (!parts) continue;
                std::memset(tile, 0, sizeof(float) * Q * size);
                for (n_t q = 0; q < Q; ++q)
                    for (n_t p = 0; p < panels; ++p)
                        panel(near + q * T * n, 1, n, xs + q * wide + p * T * PANEL, PANEL, T,
                              tile + q * size + p * n * PANEL, PANEL, n);
                few_contract<Q>(tile, size, tau + o * I + i, I, k_stride, K, n, width, parts + block * Q * K);
            }
            for (n_t q = 0; q < Q && dx; ++q)
                for (n_t p = 0; p < panels; ++p)
                    for (n_t t = 0; t < T; ++t)
                        copy(dx + (q * T + t) * I + i + p * PANEL, sums + q * wide + (p * T + t) * PANEL,
                             least(PANEL, width - p * PANEL));
        }
    }
}
