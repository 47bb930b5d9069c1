"""Every row of the table keeps the contract, and each begins as it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from latent_delib import mesh as mesh_lib
from latent_delib.delib import augment, flops, traces
from latent_delib.delib.augment import Augmentation
from latent_delib.delib.coprocessor import Inserted, Reading
from latent_delib.delib.cost import step_flops
from latent_delib.delib.flops import Flops
from latent_delib.delib.methods import METHODS, Method, param_axes
from latent_delib.errors import UserError
from latent_delib.nn import rotary, transformer
from latent_delib.nn.transformer import Transformer

B, T, M, L = 2, 6, 3, 5
CONFIG = small.GEMMA
MODEL = Transformer(CONFIG)
OTHER = Transformer(
    dataclasses.replace(
        CONFIG, num_layers=2, embed_dim=24, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=20
    )
)
DECODER = jax.tree.map(jnp.asarray, small.decoder(CONFIG))
ASSISTANT = jax.tree.map(jnp.asarray, small.decoder(OTHER.config, seed=3))
AT = jnp.array([[0, 2, 4], [1, 2, 3]])
LAY_OUT = jax.jit(traces.lay_out, static_argnums=(3, 4, 5))
TRACES = LAY_OUT(jnp.zeros((B, T), int), jnp.ones((B, T), int), AT, L, 2, "overlay")
WRITING = [name for name, method in METHODS.items() if method.write]
WITH_BODY = ["cache_augmentation", "from_scratch", "last_layer", "inserted", "joint", "sequential"]


def settings(name, num_latents=L):
    own = OTHER if name in ("resized", "assistant") else None
    return Augmentation(MODEL, name, num_latents, "overlay", coprocessor=own)


def begun_from(name):
    return ASSISTANT if name == "assistant" else DECODER


@functools.cache
def starter(name):
    return jax.jit(lambda key, decoder: METHODS[name].init(key, decoder, settings(name)))


def begin(name, seed=0, decoder=None):
    return starter(name)(jax.random.key(seed), decoder or begun_from(name))


@functools.partial(jax.jit, static_argnums=0)
def write(name, tree, text):
    """Latents of a tree; where that has no decoder, over the one that is frozen."""
    params = augment.assemble({"decoder": DECODER}, tree)
    return METHODS[name].write(settings(name), params, text, TRACES)


def text_of(seed, dtype=jnp.float32):
    """What some decoder, and some assistant, might have read."""

    def cache_of(config):
        cache = small.empty_cache(config, B, T, dtype)
        k, v = jax.random.normal(jax.random.key(seed), (2, *cache.k.shape), dtype)
        position = jnp.tile(jnp.arange(T), (B, 1))
        return cache._replace(k=k, v=v, position=position, length=jnp.full((B,), T))

    outputs = jax.random.normal(jax.random.key(seed), (B, T, CONFIG.embed_dim), dtype)
    return Reading(outputs, cache_of(CONFIG), cache_of(OTHER.config))


@pytest.mark.parametrize("name", METHODS)
def test_trainable_tree(name):
    """Latents come from a coprocessor that reads no tokens; a decoder is in it if that trains."""
    shapes = jax.eval_shape(lambda: begin(name))
    assert ("coprocessor" in shapes) == (name in WRITING)
    assert (
        ("decoder" in shapes)
        == METHODS[name].trains_decoder
        == (name in ("decoder", "joint", "unified", "feedback"))
    )
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    if "decoder" in shapes:
        assert jax.tree.map(jnp.shape, shapes["decoder"]) == jax.tree.map(jnp.shape, DECODER)
    if name not in WRITING:
        return
    tree = shapes["coprocessor"]
    assert "embedding" not in str(jax.tree.structure(tree))
    config = settings(name).models.coprocessor.config
    if name == "cartridge":
        shape = (CONFIG.num_layers, L, CONFIG.num_kv_heads, CONFIG.head_dim)
        assert jax.tree.map(jnp.shape, tree) == {"keys": shape, "values": shape}
        return
    soft_tokens = 1 if name in ("pause_tokens", "feedback") else L
    assert tree["soft_tokens"].shape == (soft_tokens, config.embed_dim)
    if name in WITH_BODY:
        body, wanted = ({n: t[n] for n in ("layers", "final_norm")} for t in (tree, DECODER))
        assert set(tree) == {"layers", "final_norm", "soft_tokens"}
        assert jax.tree.map(jnp.shape, body) == jax.tree.map(jnp.shape, wanted)
    elif name == "assistant":
        assert set(tree) == {"layers", "final_norm", "soft_tokens", "latents_out"}
    elif METHODS[name].cost is flops.no_pass or name in ("unified", "feedback"):
        assert set(tree) == {"soft_tokens"}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_logical_axes(name):
    shapes = jax.eval_shape(lambda: begin(name))
    axes = param_axes(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        assert len(axes[path[-1].key]) >= leaf.ndim, path


def test_a_parameter_may_not_have_the_name_of_a_layers(monkeypatch):
    """Rules for the optimizer and the mesh go by leaf names."""
    taken = METHODS["static_tokens"]._replace(axes={"gate": (None,)})
    monkeypatch.setitem(METHODS, "gated", taken)
    with pytest.raises(ValueError, match=r"'gated': \['gate'\] are parameters of layers"):
        param_axes("gated")


def test_a_row_brings_parameters_and_a_cost_of_its_own(monkeypatch):
    """A method of one row: static tokens with a scale of their own, at a price."""

    def start(key, decoder, aug):
        tree = METHODS["static_tokens"].init(key, decoder, aug)["coprocessor"]
        return tree | {"loudness": jnp.ones(aug.decoder.config.embed_dim)}

    def loud(aug, params, reading, traces):
        return params["coprocessor"]["loudness"] * METHODS["static_tokens"].write(
            aug, params, reading, traces
        )

    price = Flops(useful=1e6, recomputed=2e6)
    row = Method(start, loud, cost=lambda writing: price, axes={"loudness": ("embed",)})
    monkeypatch.setitem(METHODS, "loud", row)
    mesh = mesh_lib.make({"fsdp": 2}, jax.devices()[:2])
    tree = row.init(jax.random.key(0), DECODER, settings("loud"))
    shardings = mesh_lib.parameters(mesh, tree, param_axes("loud"))
    assert shardings["coprocessor"]["loudness"].spec == jax.sharding.PartitionSpec(
        ("fsdp", "traces")
    )
    assert write("loud", tree, text_of(0)).shape == (B, M, L, CONFIG.embed_dim)
    loud, static = (
        step_flops(Augmentation(MODEL, name, L), B, T, M, 2) for name in ("loud", "static_tokens")
    )
    assert loud.useful - static.useful == price.useful
    assert loud.recomputed - static.recomputed == price.recomputed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WRITING)
def test_latents_have_the_shape_and_the_dtype_of_the_text(name, dtype):
    def latents():
        tree = begin(name)
        return write(name, jax.tree.map(lambda x: x.astype(dtype), tree), text_of(0, dtype))

    z = jax.eval_shape(latents)
    if METHODS[name].writes_keys:
        assert isinstance(z, Inserted)
        shape = (B, M, CONFIG.num_layers, L, CONFIG.num_kv_heads, CONFIG.head_dim)
        assert {(x.shape, x.dtype) for x in z} == {(shape, jnp.dtype(dtype))}
    else:
        assert z.shape == (B, M, L, CONFIG.embed_dim) and z.dtype == dtype


@pytest.mark.parametrize("name", [n for n in WRITING if n not in ("resized", "cartridge")])
def test_soft_tokens_are_distinct_rows_of_the_token_table(name):
    table = begun_from(name)["embedding"]
    for seed in range(2):
        soft = np.array(begin(name, seed)["coprocessor"]["soft_tokens"])
        rows = np.argmax(np.all(soft[:, None] == table, axis=-1), axis=1)
        np.testing.assert_array_equal(soft, table[rows])
        assert len(set(rows.tolist())) == len(soft)
    assert not np.array_equal(soft, begin(name, 0)["coprocessor"]["soft_tokens"])


def test_soft_tokens_do_not_repeat_when_all_rows_are_taken():
    decoder = DECODER | {"embedding": DECODER["embedding"][:L]}
    soft = begin("static_tokens", 0, decoder)["coprocessor"]["soft_tokens"]
    np.testing.assert_array_equal(np.sort(soft[:, 0]), np.sort(decoder["embedding"][:, 0]))
    with pytest.raises(UserError, match=f"num_latents={L}: .* {L - 1}"):
        begin("static_tokens", 0, DECODER | {"embedding": DECODER["embedding"][: L - 1]})


@pytest.mark.parametrize("name", [name for name in WITH_BODY if name != "from_scratch"])
def test_a_coprocessor_starts_as_the_decoder(name):
    """Float32 master weights, of a decoder in bfloat16 too."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DECODER)
    for decoder in (DECODER, half):
        tree = begin(name, 0, decoder)["coprocessor"]
        for part in ("layers", "final_norm"):
            jax.tree.map(
                lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32)),
                tree[part],
                decoder[part],
            )
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_from_scratch_starts_at_random():
    tree, again = (begin("from_scratch", seed)["coprocessor"] for seed in (0, 1))
    q, other = (t["layers"]["attn"]["q"] for t in (tree, again))
    assert not np.any(q == other) and not np.any(q == DECODER["layers"]["attn"]["q"])
    assert 0.8 < np.std(q) * CONFIG.embed_dim**0.5 < 1.2


@pytest.mark.parametrize("name", ["decoder", "joint", "unified", "feedback"])
def test_a_trained_decoder_starts_as_it_is(name):
    tree = METHODS[name].init(jax.random.key(0), DECODER, settings(name))
    assert tree["decoder"] is DECODER


@pytest.mark.parametrize(
    "name", [name for name in WRITING if METHODS[name].reads_text and name != "feedback"]
)
def test_a_coprocessor_reads_the_text(name):
    """The same weights over two texts: latents of every trace differ."""
    tree = begin(name)
    for one, other in zip(*(jax.tree.leaves(write(name, tree, text_of(seed))) for seed in (0, 1))):
        differ = np.abs(one - other)
        if METHODS[name].writes_keys:  # the first layer's keys and values are the soft tokens'
            differ = differ[:, :, 1:]
        assert np.all(differ.max(axis=-1) > 1e-3)


@pytest.mark.parametrize("name", WRITING)
def test_latents_do_not_depend_on_text_after_their_place(name):
    """A method is given the whole row; what follows the last trace may change no latent."""
    tree, reading = begin(name), text_of(0)
    follows = np.arange(T) > np.max(AT)

    def changed(x, axis):
        return jnp.where(follows.reshape([-1] + [1] * (x.ndim - axis - 1)), x + 3, x)

    def changed_cache(cache):
        return cache._replace(k=changed(cache.k, 2), v=changed(cache.v, 2))

    other = Reading(
        changed(reading.outputs, 1), changed_cache(reading.cache), changed_cache(reading.assistant)
    )
    found, wanted = (write(name, tree, each) for each in (other, reading))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_method_whose_parameter_is_a_tree_is_refused():
    """Adapters, the export and the cost know layers and single arrays alone."""
    method = Method(lambda *_: {"second": {"layers": {}}}, write=None, cost=flops.no_pass)
    with pytest.raises(
        ValueError, match="parameter 'second' of the coprocessor: expected one array"
    ):
        method.init(jax.random.key(0), DECODER, settings("joint"))


def test_a_cartridge_starts_with_keys_and_values_of_tokens():
    """They are those that the decoder makes where L tokens stand at position 0, in every layer."""
    tree = begin("cartridge")["coprocessor"]
    rows = begin("static_tokens")["coprocessor"]["soft_tokens"]
    x = transformer.embed(rows, jnp.arange(L), CONFIG)[None, None]
    zeros = jnp.zeros((1, 1, L), jnp.int32)
    _, kv = MODEL.apply({"params": DECODER}, x, zeros, transformer.own_text(zeros[0]))
    for found, expected in ((tree["keys"], kv.k), (tree["values"], kv.v)):
        np.testing.assert_allclose(found, expected[:, 0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_single_latent_of_feedback_is_its_soft_token():
    aug = settings("feedback", 1)
    tree = METHODS["feedback"].init(jax.random.key(0), DECODER, aug)
    params = augment.assemble({"decoder": DECODER}, tree)
    of_one = traces.lay_out(jnp.zeros((B, T), int), jnp.ones((B, T), int), AT, 1, 2, "after")
    z = METHODS["feedback"].write(aug, params, text_of(0), of_one)
    token = transformer.scaled(tree["coprocessor"]["soft_tokens"][0], CONFIG)
    np.testing.assert_array_equal(z, np.broadcast_to(token, (B, M, 1, CONFIG.embed_dim)))


def through_identity(config, tree):
    """A coprocessor's tree with maps that change nothing."""
    K, H, D = config.num_kv_heads, config.head_dim, config.embed_dim
    same = jnp.tile(jnp.eye(K * H).reshape(K, H, K, H), (config.num_layers, 1, 1, 1, 1))
    return tree | {"keys_in": same, "values_in": same, "latents_out": jnp.eye(D)}


@pytest.mark.parametrize(
    "family, num_layers",
    [
        ("llama", 6),
        pytest.param("gemma", 4, marks=pytest.mark.slow),
        pytest.param("llama", 2, marks=pytest.mark.slow),
        pytest.param("gemma", 2, marks=pytest.mark.slow),
        pytest.param("gpt2", 2, marks=pytest.mark.slow),
    ],
)
def test_maps_that_change_nothing(family, num_layers):
    """Of the same shape: no maps. Of another depth: it reads layers at the same relative depth."""
    config = dataclasses.replace(small.CONFIGS[family], num_layers=4)
    decoder = jax.tree.map(jnp.asarray, small.decoder(config))
    own = dataclasses.replace(config, num_layers=num_layers)
    tree = jax.tree.map(jnp.asarray, small.coprocessor(own, L))
    params = {"decoder": decoder, "coprocessor": through_identity(own, tree)}
    position = jnp.array([[3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5]])
    cache = small.empty_cache(config, B, T, jnp.float32)
    k, v = jax.random.normal(jax.random.key(0), (2, *cache.k.shape))
    text = Reading(jnp.zeros((B, T, config.embed_dim)), cache._replace(k=k, v=v, position=position))
    aug = Augmentation(Transformer(config), "resized", L, coprocessor=Transformer(own))
    through_maps = functools.partial(METHODS["resized"].write, aug)
    found = jax.jit(through_maps)(params, text, TRACES)

    layers = jnp.array({2: [0, 3], 4: [0, 1, 2, 3], 6: [0, 1, 1, 2, 2, 3]}[num_layers])
    # layers 0 and 3 are a local and a global one, and so are its own 0 and 1
    if num_layers == 2 and family == "gemma":
        assert [config.is_local[l] for l in (0, 3)] == list(own.is_local)
    read = text._replace(cache=text.cache._replace(k=k[layers], v=v[layers]))
    plain = Augmentation(Transformer(own), "cache_augmentation", L)
    without = functools.partial(METHODS["cache_augmentation"].write, plain)
    expected = jax.jit(without)(params, read, TRACES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_coprocessor_of_an_assistant_starts_as_that_and_keeps_the_size_of_its_outputs():
    tree = begin("assistant")["coprocessor"]
    for part in ("layers", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, tree[part], ASSISTANT[part])
    assert tree["latents_out"].shape == (OTHER.config.embed_dim, CONFIG.embed_dim)
    x = jax.random.normal(jax.random.key(0), (100, OTHER.config.embed_dim))
    assert 0.9 < np.std(x @ tree["latents_out"]) < 1.1


@pytest.mark.slow
def test_maps_do_not_depend_on_the_position():
    """Text and latents moved on together: the latents stay."""
    tree, text = begin("resized"), text_of(0)
    theirs, own = (
        Transformer(dataclasses.replace(m.config, layer_pattern=("global",)))
        for m in (MODEL, OTHER)
    )
    aug = Augmentation(theirs, "resized", L, coprocessor=own)
    through_maps = jax.jit(functools.partial(METHODS["resized"].write, aug))
    found = []
    for moved in (0, 1000):
        cache = text.cache._replace(position=text.cache.position + moved)
        marks = TRACES._replace(latent_position=TRACES.latent_position + moved)
        # Keys as a decoder at these positions would have turned them.
        table = rotary.table(cache.position, CONFIG.head_dim, CONFIG.rope_base, CONFIG.rope_scaling)
        cache = cache._replace(k=jnp.stack([rotary.rotate(k, table) for k in text.cache.k]))
        params = augment.assemble({"decoder": DECODER}, tree)
        found.append(through_maps(params, text._replace(cache=cache), marks))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)
