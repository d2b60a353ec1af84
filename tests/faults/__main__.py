"""python -m tests.faults: write docs/reliability.md, which says what every fault does."""

from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs/reliability.md"


def document() -> str:
    """The document, from the table."""
    return ""


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
