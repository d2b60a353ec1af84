"""Files that are cut short, emptied, overwritten or gone."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.lab import Lab, State
from tests.faults.oracle import md5


def cut(path: str, keep: float = 0.5, state: State = "finished") -> Callable[[Lab], None]:
    """A file of the workspace loses its end."""
    return partial(_cut, path=path, keep=keep, state=state)


def _cut(lab: Lab, path: str, keep: float, state: State) -> None:
    lab.begin(state)
    file = lab.clone / path
    content = file.read_bytes()
    file.unlink()  # it may be linked with DVC's cache
    file.write_bytes(content[: int(keep * len(content))])


def cached(path: str, content: bytes, linked: bool) -> Callable[[Lab], None]:
    """An object of DVC's cache is damaged, and so is the file that was made from it, by a link or by a copy.

    The stage that reads it says so; DVC's cache is rid of it then, and the next `dvc repro` makes it again.
    """
    return partial(_cached, path=path, content=content, linked=linked)


def _cached(lab: Lab, path: str, content: bytes, linked: bool) -> None:
    lab.begin("downloaded" if path.startswith("data/") else "trained")
    damage_object(lab, path, content, linked)
    lab.fail().says("was damaged on the disk; it is removed", f"{path} is")


def cached_unread(lab: Lab) -> None:
    """The same where no stage is to run: nobody reads the file, and DVC itself says that it is empty."""
    lab.begin("finished")
    damage_object(lab, "models/vae.safetensors", b"", linked=True)
    lab.repro().says("'models/vae.safetensors' is empty")
    lab.repro("--force", "--single-item", "train")


def damage_object(lab: Lab, path: str, content: bytes, linked: bool) -> None:
    """Overwrite an object of DVC's cache and the output that belongs to it."""
    file, found = lab.clone / path, object_of(lab, path)
    found.chmod(0o644)
    found.write_bytes(content)
    found.chmod(0o444)
    file.unlink()
    if linked:
        os.link(found, file)
    else:
        file.write_bytes(content)


def object_of(lab: Lab, path: str) -> Path:
    """Where DVC's cache has an output, or a file of one, that is whole in the workspace."""
    name = md5(lab.clone / path)
    return lab.clone / ".dvc/cache/files/md5" / name[:2] / name[2:]


def removed(*paths: str) -> Callable[[Lab], None]:
    """Files or folders are gone."""
    return partial(_removed, paths=paths)


def _removed(lab: Lab, paths: tuple[str, ...]) -> None:
    lab.begin("finished")
    for path in paths:
        target = lab.clone / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def store_removed(lab: Lab) -> None:
    """MLflow's store is gone, and nothing is to run: `make sync` makes it again from the journal."""
    _removed(lab, ("mlflow.db", "mlruns"))
    lab.sync().succeeded()


def tracking_removed(lab: Lab) -> None:
    """Store and journal are gone: only running again tells them anew."""
    _removed(lab, ("mlflow.db", "mlruns", "journal"))
    lab.repro("--force")


def checkpoint(change: Callable[[bytes], bytes]) -> Callable[[Lab], None]:
    """Training is killed, and its checkpoint damaged."""
    return partial(_checkpoint, change=change)


def _checkpoint(lab: Lab, change: Callable[[bytes], bytes]) -> None:
    lab.begin("downloaded")
    running = lab.start("dvc", "repro", "train")
    lab.wait_for_epoch(3)
    running.end()
    lab.wait_for_quiet()
    [file] = lab.clone.glob("checkpoints/*/last.ckpt")
    file.write_bytes(change(file.read_bytes()))
    lab.next_says = ("training starts again from its first epoch",)


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    return b""


def flipped(content: bytes) -> bytes:
    """One bit in the middle, among the weights."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def replaced_by_pickle(content: bytes) -> bytes:
    """A pickle that would run a command when it is loaded."""
    return b"cos\nsystem\n(S'touch owned'\ntR."


def checkpoint_with_code(lab: Lab) -> None:
    _checkpoint(lab, replaced_by_pickle)
    lab.repro().says(*lab.next_says)
    lab.next_says = ()
    assert not list(lab.clone.rglob("owned"))


def lock_file(content: str) -> Callable[[Lab], None]:
    """dvc.lock is not what DVC wrote: DVC refuses to work, `make run` says what to do."""
    return partial(_lock_file, content=content)


def _lock_file(lab: Lab, content: str) -> None:
    lab.begin("finished")
    lock = lab.clone / "dvc.lock"
    text = lock.read_text()
    middle = text.index("md5:", len(text) // 2) + len("md5")  # within a line: between two, what is left may be whole
    lock.write_text(content.format(text=text, half=text[:middle]))
    lab.fail()
    assert "`git checkout -- dvc.lock` brings back" in lab.remedies()
    lab.run("git", "checkout", "HEAD", "--", "dvc.lock").succeeded()


def rwlock(content: str) -> Callable[[Lab], None]:
    """DVC's note of who reads and writes is damaged, or names a process of our days: DVC refuses to work."""
    return partial(_rwlock, content=content)


def _rwlock(lab: Lab, content: str) -> None:
    lab.begin("downloaded")
    note = lab.clone / ".dvc/tmp/rwlock"
    note.write_text(content.replace("PID", str(os.getpid())).replace("CLONE", str(lab.clone)))
    lab.fail("train")
    assert "rm .dvc/tmp/rwlock" in lab.remedies()
    note.unlink()


def stale_rwlock(lab: Lab) -> None:
    """The note names a process that is gone: DVC sees that itself."""
    lab.begin("downloaded")
    content = '{"write": {"CLONE/models/vae.safetensors": {"pid": 4194303, "cmd": "dvc repro"}}, "read": {}}'
    (lab.clone / ".dvc/tmp/rwlock").write_text(content.replace("CLONE", str(lab.clone)))


def params_cut(lab: Lab) -> None:
    lab.begin("finished")
    params = lab.clone / "params.yaml"
    text = params.read_text()
    params.write_text(text[: text.index("evaluate:") + 20])
    lab.fail()
    lab.run("git", "checkout", "--", "params.yaml").succeeded()


def scratch_left(lab: Lab) -> None:
    """Scratch folders of a process that was killed, and a number that another process has by now."""
    lab.begin("downloaded")
    for folder in ("models", "plots", "metrics"):
        left = lab.clone / folder / ".writing-4194303-abc"
        left.mkdir(parents=True)
        (left / "half").write_bytes(b"half")
