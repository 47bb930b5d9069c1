"""An asynchronous coprocessor, on devices of its own: the decoder never waits for it (the paper simulates it)."""

import warnings

import jax
from jax.sharding import Mesh, NamedSharding

from latent_delib import mesh as mesh_lib
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Latents
from latent_delib.delib.coprocessor import Reading as Text
from latent_delib.lm import decoding
from latent_delib.nn import cache as cache_lib
from latent_delib.nn.cache import Cache
from latent_delib.nn.transformer import Params


class Beside:
    """An `decoding.Coprocessor` whose latents join when they are ready, whenever that is.

    Its work is queued on its devices, behind the text that it reads, and looked at without waiting. Where it fails, it
    says so once and answers no more: decoding goes on with the latents that have joined before; where none have, it is
    the plain decoder's, bit for bit.

    Args:
      params, aug: the coprocessor's, as they lie on `mesh`. home: the mesh that latents are brought to.
    """

    def __init__(self, params: Params, aug: Augmentation, mesh: Mesh, home: Mesh):
        self.params, self.aug, self.mesh, self.home = params, aug, mesh, home
        self.latents: Latents | None = None
        self.failed = False

    def ask(self, read: Text, text_BX: jax.Array, made: int) -> None:
        if not self.failed:
            try:
                self.latents = self._write(read, text_BX)
            except Exception as error:  # whatever it is, the decoder goes on
                self._give_up(error)

    def _write(self, read: Text, text_BX: jax.Array) -> Latents:
        """Latents of the text that was read: it travels to the coprocessor, they travel back."""
        row = mesh_lib.rows(self.mesh)
        kv = NamedSharding(self.mesh, mesh_lib.spec(cache_lib.AXES, mesh_lib.ACTIVATIONS))
        read = jax.device_put(read, Text(row, Cache(kv, kv, row, row)))
        z = decoding.latents(self.params, read, jax.device_put(text_BX, row), aug=self.aug)
        return jax.device_put(z, mesh_lib.rows(self.home))

    def answer(self, made: int) -> Latents | None:
        if self.latents is None:
            return None
        try:
            if not all(x.is_ready() for x in jax.tree.leaves(self.latents)):
                return None
            z, self.latents = self.latents, None
            return jax.block_until_ready(z)
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self.failed, self.latents = True, None
        warnings.warn(f"the coprocessor failed, the decoder goes on without new latents: {error!r}", stacklevel=3)

    def next_look(self, made: int) -> int | None:
        return None if self.latents is None else made + 1
