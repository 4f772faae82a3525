"""RLOO with everything inline, to be read from top to bottom: `python examples/loop_rloo.py`.

The model is the built-in `tiny`: random weights and one token a byte, so this shows what happens and not what a real
model reaches. The planted reward: how many lower-case letters an answer has. Only the model comes from trimtab;
`trimtab rloo` does the same with chat templates, a key-value cache, reward models, micro-batches and held-out figures.
"""

import copy
import random

import torch

from trimtab.builtin import tiny

STEPS, PROMPTS, GROUP_SIZE, NEW_TOKENS, LEARNING_RATE, BETA = 40, 4, 8, 12, 3e-3, 0.1

torch.manual_seed(0)
policy, tokenizer = tiny()
policy.eval()  # no dropout: policy and reference agree before the first step
reference = copy.deepcopy(policy).requires_grad_(False)

# ---- Prompts and reward; the held-out prompts are about other words than the training prompts

words = ["sea", "sky", "sun", "rain", "snow", "wind", "leaf", "rose", "bird", "fish", "bread", "milk", "lamp", "door"]
prompts = [f"Say {word}: " for word in words]
training, held_out = prompts[:10], prompts[10:]


def reward(answer: str) -> float:
    return float(sum("a" <= letter <= "z" for letter in answer))


# ---- Sample: one token after the other, each from the policy's own distribution at temperature 1


@torch.no_grad()
def sample(asked: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prompt_ids = [tokenizer(prompt).input_ids for prompt in asked for _ in range(GROUP_SIZE)]  # siblings are neighbours
    width = max(map(len, prompt_ids))
    padded = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in prompt_ids]  # on the left: all end alike
    ids = torch.tensor(padded)
    real = torch.arange(width) >= torch.tensor([[width - len(ids)] for ids in prompt_ids])  # lengths, never ids
    answer = torch.zeros_like(real)  # True where a token belongs to the answer
    going_on = torch.ones(len(ids), 1, dtype=torch.bool)
    for _ in range(NEW_TOKENS):  # without a cache, every token reads all before it again: slow and short
        logits = policy(**inputs_of(ids, real)).logits[:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1)
        ids, real, answer = (torch.cat(pair, dim=1) for pair in ((ids, drawn), (real, going_on), (answer, going_on)))
        going_on = going_on & (drawn != tokenizer.eos_token_id)  # the end token is the last that counts
    return ids, real, answer


def inputs_of(ids: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    positions = (real.cumsum(-1) - 1).clamp(min=0)  # padding on the left takes no positions
    return {"input_ids": ids, "attention_mask": real.long(), "position_ids": positions}


# ---- Score: the text of each answer, its reward


def texts_of(ids: torch.Tensor, answer: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row[kept], skip_special_tokens=True) for row, kept in zip(ids, answer, strict=True)]


# ---- The log-probability of each answer, summed over its tokens (nats)


def answer_logprobs(model: torch.nn.Module, ids: torch.Tensor, real: torch.Tensor, answer: torch.Tensor):
    predicted = model(**inputs_of(ids, real)).logits.float()[:, :-1].log_softmax(-1)  # t predicts t + 1: the only shift
    of_tokens = predicted.gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(answer[:, 1:], of_tokens, 0).sum(-1)


def leave_one_out(returns: torch.Tensor) -> torch.Tensor:
    """Each answer's return minus the mean of its siblings', so that no answer is compared with itself."""
    groups = returns.view(-1, GROUP_SIZE)
    others = (groups.sum(-1, keepdim=True) - groups) / (GROUP_SIZE - 1)
    return (groups - others).flatten()


def mean_reward(asked: list[str]) -> float:
    ids, _, answer = sample(asked)
    return sum(map(reward, texts_of(ids, answer))) / len(ids)


# ---- The loop: draw a batch from the policy as it is now, compute a loss, take a step

optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
shuffled = random.Random(0)
print(f"held-out reward before: {mean_reward(held_out):.2f} of {NEW_TOKENS}")
for step in range(STEPS):
    ids, real, answer = sample(shuffled.sample(training, PROMPTS))
    scores = torch.tensor([reward(text) for text in texts_of(ids, answer)])
    logprobs = answer_logprobs(policy, ids, real, answer)
    with torch.no_grad():
        kl = logprobs - answer_logprobs(reference, ids, real, answer)  # its mean is KL(policy || reference), per answer
        advantages = leave_one_out(scores - BETA * kl)  # the price of KL is taken out of the reward
    loss = -(advantages * logprobs).mean()  # its gradient is the policy gradient; its value means nothing
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    if step % 5 == 0 or step == STEPS - 1:
        print(f"step {step:2d}  reward {scores.mean():.2f}  KL {kl.mean().item():.4f} nats an answer")
print(f"held-out reward after: {mean_reward(held_out):.2f} of {NEW_TOKENS}")
