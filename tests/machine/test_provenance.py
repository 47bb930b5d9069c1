"""Where a result comes from."""

from importlib import metadata

import latent_delib as ld
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
