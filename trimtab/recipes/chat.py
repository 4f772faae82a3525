"""`trimtab chat`: talks to a model in the terminal, or to two, side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from trimtab.conversation import COMMANDS, Conversation, Reply, save, to_seed, typed
from trimtab.recipes.chat_screen import lines, say, show, working
from trimtab.recipes.options import Dtype, SamplingOptions, settings_of

if TYPE_CHECKING:
    from trimtab.models import Policy
    from trimtab.records import Prompt
    from trimtab.rewards import Reward
    from trimtab.sampling import Samples

UNMEASURED = "none"
"""--reference none: KL is not measured."""


@dataclass(frozen=True)
class Chat:
    """Each answer with its length, its KL from the start model of the run, and its reward.

    Type a message, or /help. A model without a chat template continues what is typed.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub id, folder, run directory (its final model), or built-in: smollm2-135m-instruct, tiny."""
    versus: str | None = None
    """Another model that answers, too. Each goes on with its own answers."""
    reference: str | None = None
    """The model that KL is measured from; the run's start model, else --versus. none: no KL."""
    reward: tuple[str, ...] = ()
    """Score every answer, as `trimtab score` does; the sum of several."""
    reward_weights: tuple[float, ...] = ()
    """One factor for each reward; 1 unless given."""
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=256)
    seed: int = 0
    """Seed of the draws: the same conversation under the same seed has the same answers."""
    dtype: Dtype = "auto"
    """Arithmetic of the models' bodies: auto is bf16 autocast over float32 weights where the processor has bf16."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto is cuda where there is one."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off: such models are refused."""


def chat(config: Chat) -> None:
    """Load, then read a line and answer it, until there are no more."""
    import torch

    talk = open_talk(config)
    mistakes = (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError)
    try:
        for line in lines():
            try:
                goes_on = take(talk, line)
            except mistakes as error:  # of one turn, which is as if it had not been
                say(str(error) or type(error).__name__, style="yellow")
                continue
            if not goes_on:
                return
    except KeyboardInterrupt:
        say("")


# ---- Who talks


@dataclass(frozen=True)
class Speaker:
    """A model that answers: its name, the call that draws an answer by a seed, and what was said to it so far."""

    name: str
    policy: Policy
    draw: Callable[..., Samples]
    conversation: Conversation


@dataclass
class Talk:
    """The models that answer, what is measured of their answers, the seed, and the last replies."""

    speakers: list[Speaker]
    reference: Policy | None
    reward: Reward | None
    seed: int
    room: int
    """Most tokens of an answer."""
    last: list[Reply]


def open_talk(config: Chat) -> Talk:
    """Load all that answers and measures; says what KL is measured from."""
    from trimtab.recipes import training
    from trimtab.rewards import parse_rewards

    check(config)
    sampler = training.sampler_of(config.sampling)
    loading = training.scoring(config)
    reward = parse_rewards(config.reward, config.reward_weights, **loading) if config.reward else None
    names, source = [config.model, *([config.versus] if config.versus else [])], reference_of(config)
    loaded = load_all([*names, *([source] if source else [])], loading)
    draw = partial(sampler, **settings_of(config.sampling))
    speakers = [speaker_of(name, loaded[training.absolute(name)], draw) for name in names]
    reference = loaded[training.absolute(source)] if source else None
    if reference is not None and not same_vocabulary([*speakers], reference, source, config):
        reference = None
    say(legend(source if reference else None, config.sampling))
    return Talk(speakers, reference, reward, config.seed, config.sampling.max_new_tokens, [])


def check(config: Chat) -> None:
    """Refuse what has no effect, and streams that are closed."""
    if sys.stdin is None or sys.stdout is None:
        raise ValueError("chat reads from standard input and answers on standard output, and one of them is closed.")
    if config.reward_weights and not config.reward:
        raise ValueError("--reward-weights has no effect without --reward.")
    if config.sampling.batch_rows != SamplingOptions.batch_rows:
        raise ValueError(f"--batch-rows {config.sampling.batch_rows} has no effect here: answers are drawn one by one.")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed}: a number of at most 63 bits is needed.")


def reference_of(config: Chat) -> str | None:
    """What KL is measured from: what was given, what the model's run started from, or the other model."""
    from trimtab.recipes.evaluated import begun_from

    if config.reference is not None:
        return None if config.reference == UNMEASURED else config.reference
    return begun_from(config.model) or config.versus


def load_all(names: Sequence[str], loading: dict[str, Any]) -> dict[str | None, Policy]:
    """The models of some names, each once."""
    from trimtab.models import load_policy
    from trimtab.progress import console
    from trimtab.recipes import training

    loaded: dict[str | None, Policy] = {}
    for name in names:
        if training.absolute(name) not in loaded:
            policy = loaded[training.absolute(name)] = load_policy(name, **loading)
            console.print(f"{name} on {policy.device}: {policy.arithmetic.why}", markup=False)
    return loaded


def speaker_of(name: str, policy: Policy, draw: Callable[..., Samples]) -> Speaker:
    """A model that nothing was said to yet; says if it only continues texts."""
    is_plain = not policy.tokenizer.chat_template
    if is_plain:
        say(f"{name} has no chat template: it continues what is typed, and every text stands alone.")
    return Speaker(name, policy, partial(draw, policy), Conversation(is_plain))


def same_vocabulary(speakers: Sequence[Speaker], reference: Policy, source: str | None, config: Chat) -> bool:
    """Whether all models read the tokens of the reference; ValueError where they do not and it was asked for."""
    others = [one.name for one in speakers if one.policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab()]
    if not others:
        return True
    told = f"{' and '.join(others)} and {source} have different vocabularies, so there is no KL between them."
    if config.reference is not None:
        raise ValueError(f"--reference {source}: {told} Give another one, or none.")
    say(told)
    return False


def legend(source: str | None, sampling: SamplingOptions) -> str:
    """What the figures beside the answers mean."""
    if source is None:
        return "KL is not measured: no reference is known (--reference MODEL)." + HELP
    exact = f"KL: nats per answer from {source}, exact over the vocabulary at every token, summed along the answer."
    plain = SamplingOptions(sampling.max_new_tokens)
    drawn = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    if all(getattr(sampling, name) == getattr(plain, name) for name in drawn):
        return exact + HELP
    return f"{exact} The answers are not drawn plainly, so it says how far these texts go, not the whole model." + HELP


HELP = " /help lists the commands."


# ---- What is said


def take(talk: Talk, line: str) -> bool:
    """Do what a line says; whether the conversation goes on."""
    given = typed(line)
    if given.command:
        return obey(talk, given.command, given.text)
    if given.text:
        replies = [reply(speaker, speaker.conversation.asked(given.text), talk) for speaker in talk.speakers]
        both = zip(talk.speakers, replies, strict=True)
        go_on(talk, [speaker.conversation.answered(given.text, said.answer.text) for speaker, said in both])
        talk.last = replies
        show(replies)
    return True


def go_on(talk: Talk, conversations: Sequence[Conversation]) -> None:
    """Let the models' conversations be these."""
    pairs = zip(talk.speakers, conversations, strict=True)
    talk.speakers = [replace(speaker, conversation=conversation) for speaker, conversation in pairs]


def obey(talk: Talk, command: str, text: str) -> bool:
    """Do what a command says; whether the conversation goes on."""
    if command == "/system" and all(speaker.conversation.is_plain for speaker in talk.speakers):
        raise ValueError("/system has no effect: a model without a chat template knows no system message.")
    if command in ("/reset", "/system"):
        system = text if command == "/system" else None
        go_on(talk, [speaker.conversation.reset(system) for speaker in talk.speakers])
        say("the conversation begins anew")
    elif command == "/seed":
        talk.seed = to_seed(text)
        say(f"seed {talk.seed}")
    elif command == "/save":
        save(talk.last, text)
        say(f"{len(talk.last)} rows added to {text}")
    elif command == "/help":
        say("\n".join(f"{name:13} {about}" for name, about in COMMANDS.items()))
    return command != "/quit"


def reply(speaker: Speaker, prompt: Prompt, talk: Talk) -> Reply:
    """One model's answer, measured."""
    from trimtab.evals.drift import kl_per_token
    from trimtab.rollouts import score

    check_room(speaker.policy, prompt, talk.room)
    with working(speaker.name):
        samples = speaker.draw([prompt], seed=talk.seed)
        kl = talk.reference and kl_per_token(speaker.policy, talk.reference, samples).sum().item()
        reward = score(talk.reward, samples).rewards[0] if talk.reward else None
    [answer] = samples.answers
    return Reply(speaker.name, prompt, answer, len(answer.ids), talk.seed, kl, reward)


def check_room(policy: Policy, prompt: Prompt, room: int) -> None:
    """ValueError where the model cannot read the prompt and write an answer of `room` tokens after it."""
    from trimtab.tokens import encode_prompt

    most = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    length = len(encode_prompt(policy.tokenizer, prompt))
    if most is not None and length + room > most:
        raise ValueError(
            f"this is too long: {length} tokens so far and --max-new-tokens {room} are more than the {most} that the "
            "model was made for. Type /reset, or a shorter message."
        )
