"""One writer a store."""

import os
import platform
import signal
import time
from pathlib import Path

import pytest
from processes import CONTEXT, bd_merge
from tiny import Tiny
from unit_makers import hold_until_killed

from pipeline.errors import ConfigError, StoreLocked
from pipeline.store import hold


def test_a_second_process_is_told_who_holds_the_store_and_a_killed_holder_leaves_nothing(
    tiny_project: Tiny, tmp_path: Path
) -> None:
    root = tiny_project.root / "store"
    config = tiny_project.write()
    holder = CONTEXT.Process(target=hold_until_killed, args=(root,))
    holder.start()
    while not root.with_name("held").exists():
        time.sleep(0.01)
    for command in (["run", config], ["gc", "--store", root]):
        ended = bd_merge(*command, output=tmp_path / "output")
        assert ended.exit_code == 2
        for fact in (str(root), f"process {holder.pid}", platform.node(), "bd-merge run configs/mine.yaml"):
            assert fact in ended.output
        assert "Traceback" not in ended.output
    holder.kill()
    holder.join()
    assert holder.exitcode == -signal.SIGKILL
    holder.close()
    assert bd_merge("gc", "--store", root, output=tmp_path / "output").exit_code == 0


def test_the_store_is_free_after_the_block_and_after_an_error(tmp_path: Path) -> None:
    told = rf"process {os.getpid()} on .* \(first\); wait for it"
    for error in (KeyError("nothing"), RuntimeError("inside")):
        with pytest.raises(type(error)), hold(tmp_path / "store", "first"):
            with pytest.raises(StoreLocked, match=told), hold(tmp_path / "store", "second"):
                pass
            raise error
    with hold(tmp_path / "store", "third"):
        pass


def test_a_store_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="file/store cannot be written"), hold(tmp_path / "file" / "store", "run"):
        pass
