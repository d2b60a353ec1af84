"""python -m tools.share [REMOTE]: push every result that this clone's DVC cache has, so that nobody runs it again.

`dvc push` leaves out what git keeps: metrics and pictures (`cache: false`). For parameters that were tried but not
committed, git does not have them, so `dvc repro --pull` could not restore such a stage, and would run it. Here they go
to the remote too, with the record of each run (DVC's run cache), which `dvc fetch --run-cache` brings.
"""

import argparse
import sys

from dvc.repo import Repo

from mnist_vae.errors import UserError


def share(remote: str | None) -> int:
    """Push all runs and the files that they made; how many files the remote did not have.

    Raises:
        UserError: there is no such remote, it cannot be reached, or not everything arrived.
    """
    try:
        with Repo() as repo:
            repo.push(remote=remote)
            runs = repo.stage_cache.push(remote)
            objects = repo.stage_cache.get_used_objs(runs, remote=remote)
            results = [repo.cloud.push(found, remote=remote) for found in objects.values()]
    except Exception as error:  # DVC's, or whatever the client of this kind of remote raises
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"share: {said}; see docs/sharing.md") from error
    if failed := sum(len(result.failed) for result in results):
        raise UserError(f"share: {failed} files did not arrive; run it again")
    return sum(len(result.transferred) for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.share", description="Push every result to a DVC remote.")
    parser.add_argument("remote", nargs="?", help="its name; by default the default remote")
    try:
        print(f"{share(parser.parse_args().remote)} files pushed that git keeps or nobody has committed.")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
