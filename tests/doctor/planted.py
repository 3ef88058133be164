"""Scripts for the doctor with typical mistakes in models and trainers, and a function that assembles them."""

from set_ups import FAMILIES, HEAD, TRAINERS

POSITIONS_ACCEPTED = """
def attention():
    return attention_of(lambda module, kwargs: {"position_ids": None})
"""
MISTAKES = {
    "positions from 0": POSITIONS_ACCEPTED
    + """
def forward(model, part):
    return pytorch.forward(model, {**part, "position_ids": torch.arange(part["input_ids"].shape[1])[None]})
""",
    "positions over the pack": POSITIONS_ACCEPTED
    + """
def shard(cp, batch):
    part = cp.shard(batch)
    tokens = cp.planner.lay_out(part["context_parallel"].key.documents)[1].tokens(cp.rank)
    return {**part, "position_ids": torch.from_numpy(tokens.copy())[None]}
""",
    "no lengths": """
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "labels")})
""",
    "other lengths": """
def shard(cp, batch):
    return cp.shard({**batch, "document_lengths": [40, 2, 23, 32]})
""",
    "full mask": """
def context_parallel():
    return da.ContextParallel(strategy="ring", kernel="reference", document_mask="full")
""",
    "window of the mask": """
def context_parallel():
    return da.ContextParallel(strategy="ring", kernel="reference", document_mask=(7, 0))
""",
    "sdpa": """
def forward(model, part):
    pytorch.unwrapped(model).set_attn_implementation("sdpa")
    return model(part["input_ids"], position_ids=part["position_ids"], use_cache=False).logits
""",
    "no window": """
def attention():
    return attention_of(lambda module, kwargs: {"sliding_window": None})
""",
    "window + 1": """
def attention():
    return attention_of(lambda module, kwargs: {"sliding_window": w + 1} if (w := kwargs.get("sliding_window")) else {})
""",
    "window - 1": """
def attention():
    return attention_of(lambda module, kwargs: {"sliding_window": w - 1} if (w := kwargs.get("sliding_window")) else {})
""",
    "no softcap": """
def attention():
    return attention_of(lambda module, kwargs: {"softcap": None})
""",
    "no sink": """
def attention():
    return attention_of(lambda module, kwargs: {"s_aux": None})
""",
    "no scale": """
def attention():
    return attention_of(lambda module, kwargs: {"scaling": None})
""",
    "model's own loss": """
def loss(logits, part):
    # as model(labels=...) does
    return F.cross_entropy(logits[0, :-1].float(), part["labels"][0, 1:], reduction="sum") * part["loss_scale"]
""",
    "shifted after sharding": """
def shard(cp, batch):
    part = cp.shard(batch)
    tokens = torch.from_numpy(cp.planner.lay_out(part["context_parallel"].key.documents)[1].tokens(cp.rank).copy())
    return {**part, "labels": F.pad(batch["labels"][0, tokens][1:], (0, 1), value=-100)[None]}
""",
    "not shifted": """
def shard(cp, batch):
    return cp.shard({"input_ids": batch["input_ids"], "document_lengths": LENGTHS, "shift_labels": batch["labels"]})
""",
    "five lost": """
def shard(cp, batch):
    part = cp.shard(batch)
    labels = part["labels"].clone()
    labels[0, (labels[0] != -100).nonzero()[:5, 0]] = -100
    return {**part, "labels": labels}
""",
    "one lost": """
def shard(cp, batch):
    part = cp.shard(batch)
    labels = part["labels"].clone()
    if cp.rank == 1:
        labels[0, (labels[0] != -100).nonzero()[3, 0]] = -100
    return {**part, "labels": labels}
""",
    "leaked": """
def shard(cp, batch):
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return cp.shard({"input_ids": batch["input_ids"], "document_lengths": LENGTHS, "shift_labels": shifted})
""",
    "no label mask": """
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "document_lengths")})
""",
    "mean on each rank": """
def loss(logits, part):
    return F.cross_entropy(logits[0].float(), part["labels"][0])
""",
    "compensated afterwards": """
# attention has mixed the ranks' gradients by then
COUNT = [None]
def loss(logits, part):
    COUNT[0] = (part["labels"] != -100).sum()
    return F.cross_entropy(logits[0], part["labels"][0])
def backward(model, loss):
    loss.backward()
    total = COUNT[0].clone()
    dist.all_reduce(total)
    for p in model.parameters():
        p.grad *= COUNT[0] / total
    sum_gradients(model)
""",
    "mean of documents": """
def loss(logits, part):
    each = F.cross_entropy(logits[0].float(), part["labels"][0], reduction="none")
    begins = part["position_ids"][0] < 4
    return each[begins].mean() + each[~begins].mean()
""",
    "a sum": """
def loss(logits, part):
    return F.cross_entropy(logits[0].float(), part["labels"][0], reduction="sum")
""",
    "no scale of the trainer": """
def loss(logits, part):
    count = (part["labels"] != -100).sum()
    dist.all_reduce(count)
    return F.cross_entropy(logits[0].float(), part["labels"][0], reduction="sum") / count
""",
    "scale twice": """
def loss(logits, part):
    return pytorch.loss_of(logits, part) * dist.get_world_size()
""",
    "not measured": """
def setup(cp, model):
    pass
""",
    "averaged": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    for p in model.parameters():
        p.grad /= dist.get_world_size()
""",
    "not summed": """
def backward(model, loss):
    loss.backward()
""",
    "summed twice": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    sum_gradients(model)
""",
    "head not summed": """
def backward(model, loss):
    loss.backward()
    kept = model.lm_head.weight.grad.clone()
    sum_gradients(model)
    model.lm_head.weight.grad = kept
""",
    "head doubled": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    list(model.parameters())[-1].grad *= 2
""",
    "each micro-batch alone": """
def batch():
    first, second = pack(1), pack(2)
    second["labels"] = second["labels"].clone()
    second["labels"][:, 30:80] = -100
    return [first, second]
def shard(cp, batches):
    return [cp.shard(batch) for batch in batches]
""",
    "divided by the micro-batches": """
def batch():
    return [pack(1), pack(2)]
def loss(logits, part):
    return pytorch.loss_of(logits, part) / 2
""",
    "head frozen": """
def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if "lm_head" not in name and "wte" not in name}
""",
    "dropout": """
def config():
    CONFIG.resid_pdrop = 0.1
    return CONFIG
""",
    "noise": """
def forward(model, part):
    return pytorch.forward(model, part) + torch.randn(1)
""",
    "other seeds": """
def model():
    found = build()
    torch.manual_seed(dist.get_rank() if ON_RANKS() else 0)
    nn.init.normal_(list(found.parameters())[0], std=0.3)
    return found
""",
    "other batches": """
def batch():
    return pack(dist.get_rank() if ON_RANKS() else 0)
""",
    "other frequencies on rank 1": """
def model():
    found = build()
    if ON_RANKS() and dist.get_rank() == 1:
        found.model.rotary_emb.inv_freq *= 2
    return found
""",
    "other base": """
def config():
    theta = 77.0 if ON_RANKS() else 10000.0
    CONFIG.rope_parameters = {**CONFIG.rope_parameters, "rope_theta": theta}
    return CONFIG
""",
    "coarse frequencies": """
def model():
    found = build()
    if ON_RANKS():
        rotary = found.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).float() * 1.01
    return found
""",
    "other eps": """
def config():
    CONFIG.rms_norm_eps = 0.5 if ON_RANKS() else 1e-6
    return CONFIG
""",
    "halves": """
def shard(cp, batch):
    part, half = cp.shard(batch), sum(LENGTHS) // 2
    return {**part, "input_ids": batch["input_ids"][:, :half] if cp.rank == 0 else batch["input_ids"][:, half:]}
""",
    "padding": """
def batch():
    ids = torch.randint(1, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "labels")})
""",
    "attention dropout": """
def config():
    name = "attn_pdrop" if hasattr(CONFIG, "attn_pdrop") else "attention_dropout"
    setattr(CONFIG, name, 0.5)
    return CONFIG
""",
    "no such method": """
def loss(logits, part):
    return logits.no_such_thing()
""",
    "exit": """
def loss(logits, part):
    raise SystemExit(0)
""",
    "not a number": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    list(model.parameters())[3].grad[0] = float("nan")
""",
    "head missing on rank 1": """
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    if dist.get_rank() == 1:
        model.lm_head.weight.grad = None
""",
    "logits scaled": """
def forward(model, part):
    return pytorch.forward(model, part) * (1.5 + torch.arange(64) / 64)
""",
    "layer scaled": """
def forward(model, part):
    # on ranks only: the script's forward
    mlp = pytorch.unwrapped(model).get_submodule("model.layers.1.mlp")
    right = mlp.forward
    mlp.forward = lambda x: right(x) * 1.5
    try:
        return pytorch.forward(model, part)
    finally:
        mlp.forward = right
""",
    "counts itself": """
class Counting(Own):
    def forward(self, input_ids, position_ids, context_parallel):
        return super().forward(input_ids, torch.arange(input_ids.shape[1])[None], context_parallel)
Own = Counting
""",
    "counts itself, learned": """
class Counting(Own):
    def __init__(self):
        super().__init__(learned=True)
    def forward(self, input_ids, position_ids, context_parallel):
        return super().forward(input_ids, torch.arange(input_ids.shape[1])[None], context_parallel)
Own = Counting
""",
    "shift of tokens": """
class Shifting(Own):
    def forward(self, input_ids, position_ids, context_parallel):
        before = F.pad(input_ids[:, :-1], (1, 0)).masked_fill(position_ids == 0, 0)
        x = self.tokens(input_ids) + 0.5 * self.tokens(before)
        for block in self.blocks:
            x = block(x, position_ids, context_parallel)
        return self.lm_head(x)
Own = Shifting
""",
    "own base": """
class Based(Block):
    rope_theta = 100.0
    def __init__(self):
        super().__init__()
        self.rope_theta = 7.0 if ON_RANKS() else 100.0
    def forward(self, x, position_ids, context_parallel):
        q, k, v = self.qkv(self.norm(x[0])).view(-1, 3, 4, 8).unbind(1)
        q, k = rotated(q, position_ids, self.rope_theta), rotated(k, position_ids, self.rope_theta)
        x = x + self.out(context_parallel.attention(q, k, v).flatten(1))
        return x + self.mlp(F.gelu(x))
Block = Based
""",
    "rolled twice": """
def shard(cp, batch):
    part = cp.shard(batch)
    return {**part, "labels": part["labels"].roll(-1, 1)}
""",
    "a layer by itself": """
class Apart(Own):
    def forward(self, input_ids, position_ids, context_parallel):
        x = self.blocks[0](self.tokens(input_ids), position_ids, context_parallel)
        return self.lm_head(self.blocks[1](x, position_ids, Alone()))
Own = Apart
""",
    "own window": """
class Windowed(Block):
    def forward(self, x, position_ids, context_parallel):
        q, k, v = self.qkv(self.norm(x[0])).view(-1, 3, 4, 8).unbind(1)
        q, k = rotated(q, position_ids), rotated(k, position_ids)
        seen = {} if isinstance(context_parallel, Alone) else {"window": 5}
        x = x + self.out(context_parallel.attention(q, k, v, **seen).flatten(1))
        return x + self.mlp(F.gelu(x))
Block = Windowed
class Alone(Alone):
    def attention(self, q, k, v):
        tokens = torch.arange(len(q))
        seen = (tokens[:, None] >= tokens) & (tokens[:, None] - tokens < 6)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)
""",
    "a tuple, and no lengths": """
class Other(Own):
    def forward(self, ids, places, cp):
        return super().forward(ids, places, cp), None
Own = Other
def forward(model, part):
    return model(part["input_ids"], part["position_ids"], part["context_parallel"])[0]
def reference(model, ids):
    return model(ids, torch.arange(ids.shape[1])[None], Alone())[0]
def shard(cp, batch):
    return cp.shard({name: batch[name] for name in ("input_ids", "labels")})
""",
    "a batch that changes": """
BATCHES = iter(range(100))
def batch():
    return pack(next(BATCHES))
""",
    "no dropout on ranks": """
def config():
    CONFIG.resid_pdrop = 0.1
    return CONFIG
def setup(cp, model):
    model.eval()
def backward(model, loss):
    loss.backward()
    sum_gradients(model)
    sum_gradients(model)
""",
    "a scaled loss, head doubled": """
def backward(model, loss):
    (1024 * loss).backward()
    sum_gradients(model)
    for p in model.parameters():
        p.grad /= 1024
    list(model.parameters())[-1].grad *= 2
""",
    "rank 1 has none": """
def shard(cp, batch):
    part = cp.shard(batch)
    return {**part, "labels": torch.full_like(part["labels"], -100)} if cp.rank == 1 else part
""",
    "over all tokens": """
def loss(logits, part):
    return F.cross_entropy(logits[0].float(), part["labels"][0], reduction="sum") / 97
""",
    "tokens left out": """
def shard(cp, batch):
    return cp.shard({"input_ids": batch["input_ids"][:, :90], "labels": batch["labels"][:, :90],
                     "document_lengths": [41, 1, 23, 25]})
""",
    "up_proj not summed": """
def backward(model, loss):
    loss.backward()
    up = model.model.layers[1].mlp.up_proj.weight
    kept = up.grad.clone()
    sum_gradients(model)
    up.grad = kept
""",
    "a count of tokens": """
class Counted(Own):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(64))
    def forward(self, input_ids, position_ids, context_parallel):
        self.seen += F.one_hot(input_ids[0], 64).sum(0)
        return super().forward(input_ids, position_ids, context_parallel)
Own = Counted
""",
}


MISTAKES["layer scaled a little"] = MISTAKES["layer scaled"].replace("* 1.5", "* 1.0001")


def plant(mistakes: dict[str, str]) -> None:
    """Add new mistakes to those shared by all tests."""
    assert not (twice := MISTAKES.keys() & mistakes.keys()), twice
    MISTAKES.update(mistakes)


def script(family: str, trainer: str = "loop", *mistakes: str, dtype: str = "float32", more: str = "") -> str:
    """Return a doctor script from a model family, a trainer, planted mistakes and further lines."""
    planted = (MISTAKES[mistake] for mistake in mistakes)
    parts = [HEAD.format(dtype=dtype), FAMILIES[family], TRAINERS[trainer], *planted, more]
    return "\n".join(parts)
