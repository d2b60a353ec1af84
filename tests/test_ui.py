"""tools/ui.py: the page of the store that the project uses."""

from types import SimpleNamespace

import pytest

from tools import ui


@pytest.fixture
def opened(monkeypatch):
    """The addresses that a browser was asked for; no server is started."""
    addresses: list[str] = []
    monkeypatch.setattr(ui.webbrowser, "open", addresses.append)
    refused = SimpleNamespace(run=lambda command, **_: pytest.fail(f"{command} was started"))
    monkeypatch.setattr(ui, "subprocess", refused)
    return addresses


@pytest.mark.parametrize(
    "uri", ["https://mlflow.example.org", "https://mlflow.example.org/", "https://ada:secret@mlflow.example.org"]
)
def test_of_a_server_its_own_page_is_opened(monkeypatch, opened, capsys, uri):
    monkeypatch.setattr("mnist_vae.tracking.store.Store", lambda workspace: SimpleNamespace(uri=uri, experiment="7"))

    ui.main()

    assert opened == ["https://mlflow.example.org/#/experiments/7/runs"]
    assert capsys.readouterr().out == f"The runs of this project: {opened[0]}\n"
