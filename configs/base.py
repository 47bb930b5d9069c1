"""Every configuration key, declared once.

Shapes, batch and steps are the published ones (Liu et al. 2025, Section 2.3). Decoder and text are
the packaged ones. The optimizer was not published.

Other files start from this `get_config()` and change what differs. A key that is not declared here
is refused. Every command that takes --config prints its keys and these comments with --list_keys.
"""

from ml_collections import ConfigDict

from latent_delib.nn.sizes import TransformerConfig

# Tables that are empty here, and may hold fields of a dataclass.
TABLES = {"decoder.architecture": TransformerConfig, "method.coprocessor": TransformerConfig}


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # decides the order of text, the traces, and weights that start at random

    c.decoder = ConfigDict()
    c.decoder.path = "packaged"  # "packaged"; a folder; "": random weights of `architecture`
    c.decoder.architecture = ConfigDict()  # TransformerConfig; must agree with the folder's own
    c.decoder.tokenizer = ""  # "": the decoder's; or "packaged", or a tokenizer.model or .json
    c.decoder.export_dtype = "float32"  # dtype of the folder that a trained decoder is written to

    c.method = ConfigDict()
    c.method.name = "cache_augmentation"  # a row of latent_delib/delib/methods.py
    c.method.num_latents = 16  # N_L
    c.method.placement = "after"  # "after" (the paper's), "overlay", "before" or "shared"
    c.method.every = 0  # for "latent_tokens": ahead tokens from one group of latents to the next
    c.method.num_traces = 128  # M, per packed sequence
    c.method.num_ahead = 16  # N_A, the ahead tokens that carry the loss
    c.method.lora_rank = 0  # train adapters of this rank in place of matrices; 0: train matrices
    c.method.start = ""  # begin with the weights of WORKDIR/checkpoints/STEP, of the same method
    c.method.max_delay = 0  # latents are written 0 to this many tokens early, drawn for each trace
    # Latents are put only where the text ends with this, such as "Answer:", in training and
    # evaluation. Method "decoder" learns only the tokens that follow it. "": no such limit.
    c.method.prompt_end = ""
    # How many of the last text tokens the decoder still sees once latents have joined; 0: all. The
    # coprocessor sees all of them in any case.
    c.method.visible_text = 0
    c.method.assistant = ""  # for "assistant": path of another decoder of the same vocabulary
    # Weight, in [0, 1], of the divergence from a teacher; the loss of the text has the rest. The
    # teacher is the decoder with more to read: the text that `visible_text` hides or, if that is 0,
    # the written steps of questions (qa_steps:...), which latents replace. 0: no teacher, and steps
    # are ordinary text.
    c.method.distill = 0.0
    c.method.coprocessor = ConfigDict()  # for "resized": TransformerConfig unlike the decoder's

    c.data = ConfigDict()
    # packaged/train, files:GLOB, lines:GLOB, tfds:NAME:SPLIT:FEATURE, hf:OWNER/NAME:SPLIT:FEATURE;
    # for questions qa:GLOB, qa:hf:OWNER/NAME:SPLIT:QUESTION,ANSWER and the same with qa_steps
    # (docs/commands.md).
    c.data.sources = ("packaged/train",)
    c.data.weights = (1.0,)  # one per source
    c.data.validation = ("packaged/validation",)  # held-out text, named like the sources
    c.data.token_files = ""  # a directory written by `prepare`; "" reads the sources through seqio
    c.data.seq_len = 2048  # T
    c.data.max_bad_records = 0  # how many bad documents or rows to skip; one more ends the command

    c.optimizer = ConfigDict()  # linear warm-up, then cosine; the paper's is not published
    c.optimizer.name = "adamw"  # "adamw", "adafactor", "muon": OPTIMIZERS in delib/optimizer.py
    c.optimizer.learning_rate = 1e-3  # the peak
    c.optimizer.soft_token_learning_rate = 1e-3  # the peak for soft tokens; others: learning_rate
    c.optimizer.warmup_steps = 1000  # the first of them has rate 0
    c.optimizer.final_fraction = 0.1  # of the peak rate, at the last step
    c.optimizer.b1 = 0.9  # b1, b2, eps: AdamW's; b1 is Muon's momentum as well
    c.optimizer.b2 = 0.99
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # of the whole gradient

    c.train = ConfigDict()
    c.train.steps = 100_000
    c.train.batch_size = 1024  # packed sequences per step, over all hosts
    c.train.accumulation = 1  # gradient accumulation: parts of a batch, computed one after another
    c.train.log_every = 10  # steps per line of metrics
    # Steps between two losses on held-out text, always the same text; the last step has a loss too.
    # 0: never. If the text is questions, some of them are asked too.
    c.train.validate_every = 0
    c.train.wandb = ""  # a project of Weights & Biases that gets the metrics too; "": none
    c.train.checkpoint_every = 1000  # steps
    c.train.keep = 2  # newest checkpoints kept
    c.train.keep_every = 0  # checkpoints at multiples of this step are kept too; 0: none
    # How many more checkpoints are kept: those of the lowest loss, which is the mean over the steps
    # since the previous checkpoint.
    c.train.keep_best = 0
    # How many steps are skipped because loss or gradient is not finite, counted since the last
    # start; one more ends the job.
    c.train.max_bad_steps = 0
    c.train.profile_at = 0  # the three steps after this are profiled in WORKDIR/profile; 0: none

    c.compute = ConfigDict()
    c.compute.cpu_devices = 1  # devices that a CPU is split into; 2 are faster for small models
    c.compute.dtype = "bfloat16"  # of activations and frozen weights; master weights are float32
    # auto: a kernel that has passed its check on this chip (docs/performance.md), else xla. Or one
    # by name: reference, xla, pallas_gpu, pallas_tpu, tokamax_gpu.
    c.compute.attention = "auto"
    # What the backward pass computes again instead of storing it. none: nothing; dots: all but
    # products and attention; attention: all but attention; full: everything.
    c.compute.remat = "attention"
    # Logits are computed for this many tokens per sequence at a time, and for at most 4 times as
    # many tokens per device.
    c.compute.loss_chunk = 512

    c.mesh = ConfigDict()  # devices along each axis; -1: the rest of the devices
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.traces = 1
    c.mesh.tensor = 1

    c.evaluate = ConfigDict()
    c.evaluate.num_ahead = 32  # perplexity of the n-th token ahead, n = 1 ... num_ahead
    c.evaluate.max_length = 2048  # tokens of a document seen at once; longer ones are cut
    c.evaluate.batch_size = 8  # pieces at once
    c.evaluate.positions = 64  # augmented positions of each piece at once: bounds memory
    c.evaluate.max_pieces = 0  # pieces of each validation source, spread over it; 0: all
    # Positions drawn from a piece of max_length; proportionally fewer from a shorter one. 0: all.
    # With method.prompt_end all ends of prompts are used.
    c.evaluate.max_positions = 0
    c.evaluate.seed = 0  # decides what is drawn, and the confidence intervals
    c.evaluate.delay = 0  # latents are written this many tokens before they join
    # Control: every piece gets the latents of another document at the same positions.
    c.evaluate.swap = False
    c.evaluate.longer_prompt = 0  # control: only the plain decoder reads the first N tokens
    c.evaluate.temperature = 1.0  # control: the logits of both models are divided by it
    c.lock()
    c.decoder.architecture.unlock()
    c.method.coprocessor.unlock()
    return c
