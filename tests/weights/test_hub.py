"""Models by their name on the Hub, against a small server that answers as the Hub does."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from latent_delib.convert import convert, origin_of
from latent_delib.errors import Outage, UserError
from latent_delib.weights import folder, hub, locate
from tests.fake_hub import COMMIT, environment, serving

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own: the client reads where the Hub is when it is imported.
CHILD = """
import sys
import latent_delib as ld
for name in sys.argv[1:]:
    try:
        print(ld.load_decoder(name).fingerprint)
    except ld.UserError as error:
        print(error)
"""


def ask(*names: str, **variables: str) -> list[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *names], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_models_are_fetched_once_and_stay(tmp_path):
    model = tmp_path / "models" / "me" / "decoder"
    model.mkdir(parents=True)
    for path in locate.PACKAGED.iterdir():
        if path.is_file():
            (model / path.name).write_bytes(path.read_bytes())
    convert("packaged", str(tmp_path / "models" / "me" / "theirs"), "huggingface")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    expected = folder.fingerprint(locate.PACKAGED)
    with serving(tmp_path / "models") as server:
        there = environment(server, tmp_path / "cache")
        names = ("hf:me/decoder", "hf:me/decoder@other", "hf:me/gated", "hf:me/absent")
        names += ("hf:me/theirs",)  # in Hugging Face's form
        names += ("hf:me/closed", "hf:me/gone")
        found = ask(*names, **there)
        assert found[0] == expected
        assert found[1] == "hf:me/decoder@other: that model has no revision 'other'"
        assert "accept its terms" in found[2] and "HF_TOKEN" in found[2]
        assert found[3].startswith("hf:me/absent: no such model")
        assert found[4] == expected
        assert found[5] == "hf:me/closed: the Hub answers with status 403; check HF_TOKEN"
        assert found[6] == "hf:me/gone: the Hub answers with status 410"
        assert "model.safetensors" in server.asked
        assert "pytorch_model.bin" not in server.asked
    found = ask("hf:me/decoder", "hf:me/another", **there, HF_HUB_OFFLINE="1")
    assert found[0] == expected
    assert (
        found[1]
        == "hf:me/another: not in the Hub's cache, and the client is offline (HF_HUB_OFFLINE)"
    )


def test_a_conversion_knows_its_model_and_the_commit(monkeypatch, tmp_path):
    import huggingface_hub

    theirs = tmp_path / COMMIT
    convert("packaged", str(theirs), "huggingface")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: str(theirs))
    ours = tmp_path / "ours"
    convert("hf:me/to_convert@main", str(ours), dtype="bfloat16")
    origin = {"source": f"hf:me/to_convert@{COMMIT}", "dtype": "bfloat16"}
    assert origin_of(str(ours)) == folder.origin(ours) == origin
    assert origin_of("hf:me/decoder") == {"source": "hf:me/decoder", "dtype": ""}
    convert(str(theirs), str(tmp_path / "local"), dtype="bfloat16")  # the same, from a folder
    assert origin_of(str(tmp_path / "local")) == origin_of(str(tmp_path / "absent")) == {}
    assert folder.fingerprint(tmp_path / "local") == folder.fingerprint(ours)


@pytest.mark.parametrize("path", ["hf:", "hf:gemma", "hf:a/b/c", "hf:a/b@", "hf://a/b"])
def test_names_of_another_form(path):
    with pytest.raises(UserError, match="expected hf:OWNER/NAME"):
        hub.download(path)


def test_a_name_that_the_hub_does_not_allow():
    with pytest.raises(UserError, match="hf:a--b/c: .*--"):
        hub.download("hf:a--b/c")


@pytest.mark.parametrize(
    "name", ["ConnectError", "ReadError", "ReadTimeout", "ProxyError", "RemoteProtocolError"]
)
def test_a_download_that_breaks_off(name, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    client = errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]

    def fail(*_, **options):
        raise getattr(sys.modules[client], name)("in the middle of it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Outage, match="in the middle"):
        hub.download("hf:me/decoder")


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def fail(*_, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Outage, match="not in the Hub's cache, and the Hub does not answer"):
        hub.download("hf:me/decoder_of_a_silent_hub")


def test_a_hub_that_is_busy(monkeypatch):
    import huggingface_hub

    def fail(*_, **options):
        cause = ConnectionError("too many requests")
        cause.response = types.SimpleNamespace(status_code=429)
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Outage, match="the Hub answers with status 429"):
        hub.download("hf:me/decoder_of_a_busy_hub")


def test_a_process_uses_one_revision(monkeypatch):
    import huggingface_hub

    answers = iter(("first", "second"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **options: next(answers))
    assert {hub.download("hf:me/moving") for _ in range(2)} == {Path("first")}


def test_other_paths_stay_as_they_are():
    assert hub.download("runs/a") == Path("runs/a")
