"""Where a result comes from."""

import subprocess
from importlib import metadata

import latent_delib as ld
from latent_delib.machine import provenance as provenance_lib
from latent_delib.machine.provenance import provenance


def test_the_version_is_that_of_the_code_which_need_not_be_installed(monkeypatch):
    installed = metadata.version

    def version(package):
        if package == "latent_delib":
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    found = provenance(computed=False)["versions"]
    assert list(found) == ["latent_delib", "jax", "flax", "numpy"]
    assert found["latent_delib"] == ld.__version__


def test_a_result_names_its_commit_and_whether_code_was_changed(tmp_path, monkeypatch):
    def git(*words):
        about = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", "-C", tmp_path, *about, *words], capture_output=True, text=True
        )
        return done.stdout.strip()

    file = tmp_path / "package" / "machine" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("a")
    monkeypatch.setattr(provenance_lib, "__file__", str(file))
    assert provenance_lib.commit() == ""  # an installed package
    for words in (["init"], ["add", "."], ["commit", "-m", "a"], ["tag", "v1"]):
        git(*words)
    assert provenance_lib.commit() == git("rev-parse", "HEAD") != ""
    file.write_text("b")
    assert provenance_lib.commit() == git("rev-parse", "HEAD") + "-dirty"
