"""Make the page template of ``dvc plots show``, with Vega inside, so that its charts need no network.

    python -m tools.plots_page      writes .dvc/page.html and names it in .dvc/config.local

DVC's own page loads Vega from a content delivery network: without one, the charts stay empty. The template holds
a megabyte of JavaScript from the package vl-convert-python, so it is made at set-up and kept out of git. Without
it, DVC makes its own page.
"""

import sys
from pathlib import Path

import vl_convert
from dvc.cli import main as dvc

TARGET = Path(__file__).resolve().parent.parent / ".dvc" / "page.html"
VEGA_LITE = "5.20"  # DVC's chart templates are written for Vega-Lite 5

# {plot_divs} is DVC's. Its other placeholder, {scripts}, is what would load from the network.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>mnist-vae · plots</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
  body > div, table { margin: 2rem 0; overflow-x: auto; }
  table { border-collapse: collapse; }
  td, th { padding: 0 1.5rem .25rem 0; text-align: left; }
  img { max-width: 100%; height: auto; }
</style>
<script>BUNDLE</script>
</head>
<body>
<h1>mnist-vae: plots</h1>
{plot_divs}
</body>
</html>
"""


def main() -> None:
    bundle = vl_convert.javascript_bundle(vl_version=VEGA_LITE).replace("</script", "<\\/script")
    TARGET.write_text(PAGE.replace("BUNDLE", bundle), encoding="utf-8")
    sys.exit(dvc(["config", "--quiet", "--local", "plots.html_template", TARGET.name]))


if __name__ == "__main__":
    main()
