"""DPO with everything inline, to be read from top to bottom: `python examples/loop_dpo.py`.

The model is the built-in `tiny`: random weights and one token a byte, so this shows what happens and not what a real
model reaches. The planted preference: the answer that stays calm beats the one that shouts. Only the loss and the model
come from trimtab; `trimtab dpo` does the same with chat templates, LoRA, micro-batches and held-out figures.
"""

import copy
import random

import torch

from trimtab.builtin import tiny
from trimtab.losses.preference import PREFERENCE_LOSSES, Pairs

STEPS, BATCH_SIZE, LEARNING_RATE, BETA = 30, 8, 3e-4, 0.1

torch.manual_seed(0)
policy, tokenizer = tiny()
policy.eval()  # no dropout: policy and reference agree before the first step
reference = copy.deepcopy(policy).requires_grad_(False)

# ---- Data: (prompt, chosen, rejected); the held-out pairs are about other words than the training pairs


def make_pair(word: str) -> tuple[str, str, str]:
    return f"Say {word}: ", f"{word}, gladly.", f"{word.upper()}!!!"


words = ["sea", "sky", "sun", "rain", "snow", "wind", "leaf", "rose", "bird", "fish", "bread", "milk", "lamp", "door"]
training, held_out = [make_pair(word) for word in words[:10]], [make_pair(word) for word in words[10:]]

# ---- Text to tensors: a pair is two neighbouring rows, chosen then rejected; True where a token belongs to the answer


def rows_of(pairs: list[tuple[str, str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = []
    for prompt, *answers in pairs:
        prompt_ids = tokenizer(prompt).input_ids
        for answer in answers:  # the prompt is tokenized alone, so its end is known in tokens; the answer ends with EOS
            answer_ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            rows.append((prompt_ids + answer_ids, len(prompt_ids)))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    column = torch.arange(width)
    real = column < torch.tensor([[len(ids)] for ids, _ in rows])  # masks come from lengths, never from ids
    return ids, real, real & (column >= torch.tensor([[length] for _, length in rows]))


# ---- The log-probability of each answer, summed over its tokens (nats), and its length


def answer_logprobs(model: torch.nn.Module, ids: torch.Tensor, real: torch.Tensor, answer: torch.Tensor):
    logits = model(input_ids=ids, attention_mask=real.long()).logits.float()
    predicted = logits[:, :-1].log_softmax(-1)  # position t predicts token t + 1: this is the only shift
    of_tokens = predicted.gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(answer[:, 1:], of_tokens, 0).sum(-1)


def make_pairs(data: list[tuple[str, str, str]]) -> Pairs:
    ids, real, answer = rows_of(data)
    chosen, rejected = answer_logprobs(policy, ids, real, answer).view(-1, 2).unbind(-1)
    with torch.no_grad():
        ref_chosen, ref_rejected = answer_logprobs(reference, ids, real, answer).view(-1, 2).unbind(-1)
    chosen_length, rejected_length = answer.sum(-1).float().view(-1, 2).unbind(-1)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length)


@torch.no_grad()
def accuracy(data: list[tuple[str, str, str]]) -> float:
    """The share of pairs whose chosen answer gained more on the reference than the rejected one did."""
    return (make_pairs(data).margin > 0).float().mean().item()


# ---- The loop: draw a batch, compute a loss, take a step

loss_function = PREFERENCE_LOSSES["dpo"]
optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
shuffled = random.Random(0)
print(f"held-out accuracy before: {accuracy(held_out):.2f} (policy and reference are the same, and a tie is no win)")
for step in range(STEPS):
    loss = loss_function(make_pairs(shuffled.sample(training, BATCH_SIZE)), beta=BETA).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    if step % 5 == 0 or step == STEPS - 1:
        print(f"step {step:2d}  loss {loss.item():.4f}")
print(f"held-out accuracy after: {accuracy(held_out):.2f}")
