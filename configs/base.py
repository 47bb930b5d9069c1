"""Every configuration key, declared once. Shapes, batch and steps are the published ones (Liu et
al. 2025, Section 2.3), decoder and text the packaged ones; the optimizer was not published.

Other files start from `get_config()` here and change what differs. A key that is not declared here
is refused, but for the fields of TransformerConfig in `decoder.architecture` and
`method.coprocessor`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0

    c.decoder = ConfigDict()
    # a decoder folder, "packaged", or "" for random weights of `architecture`
    c.decoder.path = "packaged"
    # fields of TransformerConfig; a decoder folder has its own, and must agree
    c.decoder.architecture = ConfigDict()
    # tokenizer.model or .json; "" is the decoder's own, "packaged" the packaged corpus's
    c.decoder.tokenizer = ""
    c.decoder.export_dtype = "float32"  # of the decoder folder that training a decoder ends with

    c.method = ConfigDict()
    c.method.name = "cache_augmentation"  # a row of latent_delib/delib/methods.py
    c.method.num_latents = 16  # N_L
    # the paper's; or a row of PLACEMENTS in delib/traces.py: "overlay", "before"
    c.method.placement = "after"
    c.method.num_traces = 128  # M, per packed sequence
    c.method.num_ahead = 16  # N_A, the ahead tokens that carry the loss
    # train low-rank adapters of that rank instead of every matrix; 0: train all
    c.method.lora_rank = 0
    # WORKDIR/checkpoints/STEP of a coprocessor of the same method to begin with
    c.method.start = ""
    # latents are written up to so many tokens before they join, drawn for each trace
    c.method.max_delay = 0
    # of method "resized": fields of TransformerConfig unlike the decoder's
    c.method.coprocessor = ConfigDict()

    c.data = ConfigDict()
    # packaged/SPLIT, files:GLOB, lines:GLOB, tfds:NAME:SPLIT:FEATURE
    c.data.sources = ("packaged/train",)
    c.data.weights = (1.0,)  # one per source
    c.data.validation = ("packaged/validation",)
    c.data.token_files = ""  # a directory written by `prepare`; "" reads the sources through seqio
    c.data.seq_len = 2048  # T
    # documents or rows skipped because they cannot be used; one more ends the command
    c.data.max_bad_records = 0

    c.optimizer = ConfigDict()  # linear warm-up, cosine; not published
    c.optimizer.name = "adamw"  # or a row of OPTIMIZERS in delib/step.py: "adafactor"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.soft_token_learning_rate = 1e-3
    c.optimizer.warmup_steps = 1000
    c.optimizer.final_fraction = 0.1  # of the peak rate, at the last step
    c.optimizer.b1 = 0.9  # b1, b2, eps: AdamW's
    c.optimizer.b2 = 0.99
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.steps = 100_000
    c.train.batch_size = 1024  # packed sequences a step, over all hosts
    c.train.accumulation = 1  # parts the batch passes in
    c.train.log_every = 10
    c.train.checkpoint_every = 1000
    c.train.keep = 2  # newest checkpoints kept
    c.train.keep_every = 0  # and those of every step that this divides; 0: none
    # and that many with the lowest mean training loss since the checkpoint before
    c.train.keep_best = 0
    # steps skipped because their loss or gradient is not finite; one more ends the job
    c.train.max_bad_steps = 0
    c.train.profile_at = 0  # the step after which three are traced into WORKDIR/profile; 0: none

    c.compute = ConfigDict()
    c.compute.dtype = "bfloat16"  # of activations and frozen weights; master weights are float32
    # auto: a proven kernel, or xla; or reference, xla, pallas_gpu, pallas_tpu, tokamax_gpu
    c.compute.attention = "auto"
    # none, dots, attention, full: what the backward pass keeps, from most to least
    c.compute.remat = "attention"
    # tokens of a sequence whose logits exist at a time; on a device 4 times as many at most
    c.compute.loss_chunk = 512

    c.mesh = ConfigDict()  # devices along each axis; -1: what the others leave
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.traces = 1
    c.mesh.tensor = 1

    c.evaluate = ConfigDict()
    c.evaluate.num_ahead = 32  # perplexity of the n-th token ahead, n = 1 ... num_ahead
    # tokens of a document seen at once; longer ones are cut into pieces
    c.evaluate.max_length = 2048
    c.evaluate.batch_size = 8  # pieces at once
    c.evaluate.positions = 64  # augmented positions of each piece at once: bounds memory
    c.evaluate.max_pieces = 0  # per validation source, spread over it; 0: all
    # of a piece of max_length, and of a shorter one its share, drawn at random; 0: all
    c.evaluate.max_positions = 0
    c.evaluate.seed = 0  # of that draw, and of the confidence intervals
    c.evaluate.delay = 0  # latents are written so many tokens before they join
    # a control: every piece is given the latents of another document at the same positions
    c.evaluate.swap = False
    # a control: so many tokens of each piece are read by the plain decoder alone
    c.evaluate.longer_prompt = 0
    c.lock()
    c.decoder.architecture.unlock()
    c.method.coprocessor.unlock()
    return c
