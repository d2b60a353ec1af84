"""python -m benchmarks [--quick] [--only QUESTION …]: measure, and write benchmarks/results.md if it was all of it."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import MeasurementError, measure
from benchmarks.questions import FULL, QUESTIONS, QUICK, Bench, answer
from benchmarks.results import machine, render
from tools.clone import ROOT

RESULTS = Path(__file__).with_name("results.md")
PARTIAL = Path(__file__).with_name("results.partial.md")  # what there is so far, in case the run does not end


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the speed of the pipeline.")
    parser.add_argument("--quick", action="store_true", help="one short round; only printed, and no basis for a claim")
    parser.add_argument(
        "--only", nargs="+", choices=QUESTIONS, metavar="QUESTION", help=f"{', '.join(QUESTIONS)}; only printed"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds, instead of 3, of most questions")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        effort = replace(effort, rounds=arguments.rounds, long_rounds=arguments.rounds)

    lines, started = machine(), time.perf_counter()
    with TemporaryDirectory(prefix="benchmarks-", ignore_cleanup_errors=True) as folder:
        try:
            measure("prepare", Path(folder))
        except MeasurementError as error:
            sys.exit(
                f"benchmarks: they need MNIST (docs/experiments.md, MNIST_MIRROR), and its preparation failed.\n{error}"
            )
        if arguments.quick:
            lines.append(
                "QUICK: one round on a fraction of the images and epochs. The limits are not meant for these numbers."
            )
        lines.append(f"Rounds: {effort.rounds}")
        names, sections = arguments.only or list(QUESTIONS), []
        for section in answer(Bench(Path(folder), effort), names):
            sections.append(section)
            duration = f"Duration: {(time.perf_counter() - started) / 60:.0f} minutes"
            text = render(sections, [*lines, duration])
            if whole := not arguments.quick and not arguments.only:
                PARTIAL.write_text(text, encoding="utf-8")
    print(text)
    if whole:
        PARTIAL.replace(RESULTS)
        print(f"Written to {RESULTS.relative_to(ROOT)}.", file=sys.stderr)
    sys.exit(any(section.failure for section in sections))


if __name__ == "__main__":
    main()
