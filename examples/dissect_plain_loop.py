"""DISSect in a plain PyTorch loop, without a Trainer: fine-tune a small CLIP where 40 % of the captions are mixed up.

    python examples/dissect_plain_loop.py [--refresh epoch] [--variant momentum]

Pictures are scikit-learn's digits, coloured, in a corner of a canvas; captions say which colour and corner. The model is first
trained on 500 right pairs, which stands for a checkpoint from the Hub, then on 500 others. For each epoch it prints the share
of right captions among the pairs that it trained on. About 10 seconds on one core.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, RandomSampler, Subset
from transformers import CLIPConfig, CLIPModel

from hf_mimic import DISSectBatchSampler
from hf_mimic.losses import clip_contrastive

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "pink": (1, 0, 1),
    "white": (1, 1, 1),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
WORDS = ["<pad>", "<start>", "<end>", *"a digit at the top bottom left right".split(), *COLOURS]


def make_pairs(rows, noise, seed=0):
    """Return pairs of picture and caption as a list of dicts, and which captions are right."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.tensor(load_digits().images[rows], dtype=torch.float32) / 16  # (N, 8, 8)
    count = len(pixels)
    place, colour = (torch.randint(n, (count,), generator=generator).tolist() for n in (len(PLACES), len(COLOURS)))
    pictures, captions = torch.zeros(count, 3, 16, 16), []
    for i in range(count):
        top, left = 8 * (place[i] // 2), 8 * (place[i] % 2)
        name, rgb = list(COLOURS.items())[colour[i]]
        pictures[i, :, top : top + 8, left : left + 8] = torch.tensor(rgb)[:, None, None] * pixels[i]
        captions.append(f"<start> a {name} digit at the {PLACES[place[i]]} <end>")
    mixed = torch.randperm(count, generator=generator)[: int(noise * count)]
    source = torch.arange(count)
    source[mixed] = mixed.roll(1)
    given = [captions[i] for i in source]
    tokens = [torch.tensor([WORDS.index(word) for word in caption.split()]) for caption in given]
    pairs = [{"sample_id": i, "pixel_values": 2 * pictures[i] - 1, "input_ids": tokens[i]} for i in range(count)]
    return pairs, torch.tensor([a == b for a, b in zip(given, captions, strict=True)])


def make_model():
    """Return a CLIP of 0.2 million parameters."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 10,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {"image_size": 16, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=64))


def outputs_of(model, batch):
    return model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])


def clip_scores(outputs):
    """Return 100 * cosine of each pair (B,)."""
    return 100 * torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds)


def step(model, optimizer, batch):
    outputs = outputs_of(model, batch)
    clip_contrastive(outputs, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return outputs


def main(argv=None):
    """Train; return the share of right captions in each epoch's training pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--refresh", choices=("step", "epoch"), default="step")
    parser.add_argument("--variant", choices=("warmup", "momentum"), default="warmup")
    parser.add_argument("--selection_rate", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--pretrain_epochs", type=int, default=10)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(args.pretrain_epochs):
        for batch in DataLoader(make_pairs(slice(500, 1000), noise=0)[0], batch_size=50, shuffle=True):
            step(model, optimizer, batch)

    pairs, right = make_pairs(slice(500), noise=0.4)
    # NOTE: this CLIP has no dropout; a model that behaves otherwise in train mode is to be scored in eval mode
    sampler = DISSectBatchSampler(
        RandomSampler(pairs),
        50,
        refresh=args.refresh,
        score_fn=lambda batch: clip_scores(outputs_of(model, batch)),
        selection_rate=args.selection_rate,
        variant=args.variant,
    )
    loader = DataLoader(pairs, batch_sampler=sampler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    print(f"{right.float().mean():.2f} of all captions are right")
    shares = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        sampler.rescore(DataLoader(Subset(pairs, sampler.due()), batch_size=50))  # nothing is due with refresh="step"
        chosen = []
        for batch in loader:
            kept = sampler.select(batch) if args.refresh == "step" else batch
            outputs = step(model, optimizer, kept)
            if args.refresh == "epoch":
                sampler.update(kept["sample_id"], clip_scores(outputs))
            chosen.append(kept["sample_id"])
        shares.append(right[torch.cat(chosen)].float().mean().item())
        print(f"epoch {epoch}: trained on {sum(map(len, chosen))} pairs, {shares[-1]:.2f} of them right")
    return shares


if __name__ == "__main__":
    main()
