"""Small tokenizers made in code, one for each way in which real ones and their chat templates differ."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, END = "<s>", "</s>", "<pad>", "<|end|>"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())

SENTENCES = [
    "the answer is yes and the question is no",
    "user says the answer is good\n\nassistant says the answer is bad",
    "assistant\n\nthe answer\n\nuser\n\nthe question",
] * 4

CLOSED_BY_EOS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CLOSED_BY_NOTHING = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CLOSED_BY_END_OF_TURN = CLOSED_BY_EOS.replace("eos_token", f"'{END}'")
WITHOUT_GENERATION_PROMPT = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endfor %}"
WITHOUT_MARKERS = "{% for m in messages %}{{ m.content + '\n\n' }}{% endfor %}"
TRIMMED = CLOSED_BY_EOS.replace("m.content", "m.content | trim")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|system|>\nBe kind.' + eos_token + '\n' }}{% endif %}" + CLOSED_BY_EOS
)
WRITES_BOS = "{{ bos_token }}" + CLOSED_BY_EOS
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
DROPS_ANSWERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
ONLY_USERS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}"
)

TEMPLATES = {
    "closed by eos": CLOSED_BY_EOS,
    "closed by nothing": CLOSED_BY_NOTHING,
    "closed by end of turn": CLOSED_BY_END_OF_TURN,
    "without generation prompt": WITHOUT_GENERATION_PROMPT,
    "without markers": WITHOUT_MARKERS,
    "trimmed": TRIMMED,
    "default system": DEFAULT_SYSTEM,
    "writes bos": WRITES_BOS,
    "instruction": INSTRUCTION,
}


def _finished(
    tokenizer: Tokenizer, *, template: str | None, adds_bos: bool, pad_is_eos: bool, eos: bool = True
) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([BOS, EOS, PAD, END])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS if eos else None,
        pad_token=(EOS if pad_is_eos else PAD) if eos else PAD,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = template
    return wrapped


def byte_level(
    template: str | None = CLOSED_BY_EOS, *, adds_bos: bool = False, pad_is_eos: bool = False, eos: bool = True
) -> PreTrainedTokenizerFast:
    """One token a byte."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, template=template, adds_bos=adds_bos, pad_is_eos=pad_is_eos, eos=eos)


def merging(
    template: str | None = CLOSED_BY_EOS, *, adds_bos: bool = False, pad_is_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross words and lines, so that a token can straddle prompt and answer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finished(tokenizer, template=template, adds_bos=adds_bos, pad_is_eos=pad_is_eos)


def prefix_space(
    template: str | None = CLOSED_BY_EOS, *, adds_bos: bool = True, pad_is_eos: bool = False, legacy: bool = False
) -> PreTrainedTokenizerFast:
    """Sentencepiece as in Llama 2: spaces are letters, one is put before a text's first word, bytes as fallback.

    `legacy` puts it there by a normalizer, which also does so after every special token.
    """
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters = sorted(set("".join(SENTENCES)) - {" ", "\n"})
    vocab = {piece: i for i, piece in enumerate([*pieces, *letters])}
    merges = []
    for word in ("the", "answer", "yes", "no", "good"):
        grown = "\u2581"
        for letter in word:
            merges += [(grown, letter)] if grown + letter not in vocab else []
            grown += letter
            vocab.setdefault(grown, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer, template=template, adds_bos=adds_bos, pad_is_eos=pad_is_eos)


KINDS = {"byte level": byte_level, "merging": merging, "prefix space": prefix_space}
