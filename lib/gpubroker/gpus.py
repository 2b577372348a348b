"""GPU models: one name and one memory size for each, whatever a vendor or an agent calls it.

`NVIDIA H100 80GB HBM3`, `H100_sxm5x8` and `h100 sxm` are the model `H100 SXM`; `A100-80G`, `a100 80gb` and `A100_80GB` are
`A100 80GB`. A model's name is chip, form (where a chip comes in several) and memory (likewise). A question may leave form
and memory out: `h100` asks for every H100.
"""

import re
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Final


@dataclass(frozen=True, slots=True)
class Model:
    """A GPU. `vram_gb` is nominal, per GPU; `form` None means that the vendor does not say."""

    name: str
    chip: str
    form: str | None
    vram_gb: int


@dataclass(frozen=True, slots=True)
class _Chip:
    name: str
    vram_gb: tuple[int, ...]
    """The sizes that there are; the first is meant when nobody says which."""
    forms: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    form_vram: tuple[tuple[str, int], ...] = ()
    """Forms that have a memory size of their own."""


def _chip(
    name: str, *vram_gb: int, forms: str = "", aliases: str = "", form_vram: tuple[tuple[str, int], ...] = ()
) -> _Chip:
    return _Chip(name, vram_gb, tuple(forms.split()), tuple(aliases.split()), form_vram)


_CHIPS: Final = (
    _chip("GB300", 288), _chip("GB200", 192), _chip("B300", 288, forms="SXM"), _chip("B200", 180, forms="SXM"),
    _chip("GH200", 96, 144), _chip("H200", 141, forms="SXM NVL"),
    _chip("H100", 80, forms="SXM PCIe NVL", form_vram=(("NVL", 94),)), _chip("H800", 80, forms="SXM PCIe"),
    _chip("H20", 96, forms="SXM"),
    _chip("A100", 80, 40, forms="SXM PCIe"), _chip("A800", 80, forms="SXM PCIe"), _chip("V100", 16, 32, forms="SXM PCIe"),
    _chip("L40S", 48), _chip("L40", 48), _chip("L4", 24), _chip("A40", 48), _chip("A30", 24), _chip("A16", 16), _chip("A10G", 24),
    _chip("A10", 24), _chip("A2", 16), _chip("T4", 16), _chip("P100", 16), _chip("P40", 24), _chip("P4", 8), _chip("K80", 12),
    _chip("M60", 8), _chip("M40", 12, 24),
    _chip("RTX PRO 6000", 96, aliases="rtxpro6000blackwell rtxpro6000b rtxpro6000server rtxpro6000blackwellserveredition "
          "rtxpro6000serveredition rtxpro6000blackwellworkstationedition rtxpro6000workstation rtxpro6000ws rtxpro6000s "
          "rtxpro6000wk rtxpro6000maxq rtx6000pro rtx6000blackwell pro6000"),
    _chip("RTX PRO 5000", 48, aliases="rtxpro5000blackwell pro5000"), _chip("RTX PRO 4500", 32, aliases="rtxpro4500blackwell"),
    _chip("RTX PRO 4000", 24, aliases="rtxpro4000blackwell"),
    _chip("RTX 6000 Ada", 48, aliases="rtx6000adageneration 6000ada a6000ada"), _chip("RTX 5880 Ada", 48, aliases="5880ada"),
    _chip("RTX 5000 Ada", 32, aliases="rtx5000adageneration 5000ada"),
    _chip("RTX 4500 Ada", 24, aliases="rtx4500adageneration 4500ada"),
    _chip("RTX 4000 Ada", 20, aliases="rtx4000adageneration 4000ada rtx4000sffada"),
    _chip("RTX 2000 Ada", 16, aliases="rtx2000adageneration 2000ada"),
    _chip("RTX A6000", 48, aliases="a6000"), _chip("RTX A5500", 24, aliases="a5500"), _chip("RTX A5000", 24, aliases="a5000"),
    _chip("RTX A4500", 20, aliases="a4500"), _chip("RTX A4000", 16, aliases="a4000"), _chip("RTX A2000", 12, aliases="a2000"),
    _chip("Quadro RTX 8000", 48, aliases="rtx8000 qrtx8000"), _chip("Quadro RTX 6000", 24, aliases="rtx6000 qrtx6000"),
    _chip("Quadro RTX 5000", 16, aliases="rtx5000 qrtx5000"), _chip("Quadro RTX 4000", 8, aliases="rtx4000 qrtx4000"),
    _chip("Quadro P6000", 24, aliases="p6000"), _chip("Quadro P5000", 16, aliases="p5000"),
    _chip("Quadro P4000", 8, aliases="p4000"),
    _chip("Titan RTX", 24), _chip("Titan V", 12), _chip("Titan Xp", 12),
    _chip("RTX 5090", 32, aliases="5090"), _chip("RTX 5080", 16, aliases="5080"), _chip("RTX 5070 Ti", 16, aliases="5070ti"),
    _chip("RTX 5070", 12, aliases="5070"), _chip("RTX 5060 Ti", 16, aliases="5060ti"), _chip("RTX 5060", 8, aliases="5060"),
    _chip("RTX 4090 D", 24, aliases="4090d"), _chip("RTX 4090", 24, aliases="4090"),
    _chip("RTX 4080 Super", 16, aliases="rtx4080s 4080s 4080super"), _chip("RTX 4080", 16, aliases="4080"),
    _chip("RTX 4070 Ti Super", 16, aliases="rtx4070tis rtx4070sti 4070tis 4070tisuper"),
    _chip("RTX 4070 Ti", 12, aliases="4070ti"),
    _chip("RTX 4070 Super", 12, aliases="rtx4070s 4070s 4070super"), _chip("RTX 4070", 12, aliases="4070"),
    _chip("RTX 4060 Ti", 16, aliases="4060ti"), _chip("RTX 4060", 8, aliases="4060"),
    _chip("RTX 3090 Ti", 24, aliases="3090ti"), _chip("RTX 3090", 24, aliases="3090"), _chip("RTX 3080 Ti", 12, aliases="3080ti"),
    _chip("RTX 3080", 10, aliases="3080"), _chip("RTX 3070 Ti", 8, aliases="3070ti"), _chip("RTX 3070", 8, aliases="3070"),
    _chip("RTX 3060 Ti", 8, aliases="3060ti"), _chip("RTX 3060", 12, aliases="3060"), _chip("RTX 3050", 8, aliases="3050"),
    _chip("RTX 2080 Ti", 11, aliases="2080ti"), _chip("RTX 2080", 8, aliases="2080"), _chip("RTX 2070", 8, aliases="2070"),
    _chip("RTX 2060", 6, aliases="2060"),
    _chip("GTX 1660", 6, aliases="1660"), _chip("GTX 1080 Ti", 11, aliases="1080ti"), _chip("GTX 1080", 8, aliases="1080"),
    _chip("GTX 1070", 8, aliases="1070"), _chip("GTX 1060", 6, aliases="1060"),
    _chip("MI355X", 288, aliases="mi355"), _chip("MI350X", 288, aliases="mi350"), _chip("MI325X", 256, aliases="mi325"),
    _chip("MI300X", 192, aliases="mi300"), _chip("MI250X", 128), _chip("MI250", 128), _chip("MI210", 64), _chip("MI100", 32),
    _chip("RX 7900 XTX", 24, aliases="7900xtx"), _chip("Gaudi 3", 128), _chip("Gaudi 2", 96),
)  # fmt: skip

_NOISE: Final = re.compile(
    r"\b(nvidia|geforce|tesla|amd|radeon|instinct|intel|habana|gpu|graphics|card|core|tensor|grace|hopper)\b"
)
_COUNT: Final = re.compile(r"^\s*\d{1,2}\s*x\s+|\b(?:\d{1,2}x|x\d{1,2})\b|(?<=[a-z0-9])x\d{1,2}\b")
_TAIL: Final = re.compile(
    r"(?:(?P<form>sxm|pcie|nvlink|nvl)(?:[2-7](?!\dgb?))?(?:x\d{1,2})?|(?P<vram>\d{1,3})gb?|hbm\d?e?|gddr\d?x?|gdr|ib|generation|edition)"
)
_LARGEST_GB: Final = 300  # more is the memory of the host, or of all GPUs together: GH200_480GB, gpu-h100x8-640gb
_HOSTS: Final = {624: 144}  # GB of a GH200's two memories together, by name: what of it is the GPU's
_LEAST_SHARE: Final = 0.75  # drivers and ECC take some: vendors say 22 for 24
_SPELLINGS: Final = 4096  # that are known at once: there are some hundred, but anybody may ask for anything
_FORMS: Final = {"sxm": "SXM", "pcie": "PCIe", "nvl": "NVL", "nvlink": "SXM"}


@cache
def models() -> dict[str, Model]:
    """Every model there is, by name."""
    found: dict[str, Model] = {}
    for chip in _CHIPS:
        own = dict(chip.form_vram)
        for form in (None, *chip.forms):
            for vram in (own[form],) if form in own else chip.vram_gb:
                size = f" {vram}GB" if len(chip.vram_gb) > 1 else ""
                name = f"{chip.name}{' ' + form if form else ''}{size}"
                found[name] = Model(name, chip.name, form, vram)
    return found


@cache
def _spellings() -> tuple[tuple[str, _Chip], ...]:
    every = [(spelling, chip) for chip in _CHIPS for spelling in (compact(chip.name), *chip.aliases)]
    every += [(compact(chip.name).removeprefix("quadro"), chip) for chip in _CHIPS if chip.name.startswith("Quadro P")]
    return tuple(sorted(every, key=lambda spelled: -len(spelled[0])))


def compact(text: str) -> str:
    """The letters and digits of a text, in lower case: what spellings have in common."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


@dataclass(frozen=True, slots=True)
class _Reading:
    chip: _Chip
    form: str | None
    vram_gb: int | None


@lru_cache(_SPELLINGS)
def _read(text: str) -> _Reading | None:
    plain = re.sub(r"[_\-()/,+|]", " ", text.lower())
    spelled = compact(_NOISE.sub(" ", _COUNT.sub(" ", plain)))
    for spelling, chip in _spellings():
        if not spelled.startswith(spelling):
            continue
        form, vram, rest = None, None, spelled.removeprefix(spelling)
        while rest:
            tail = _TAIL.match(rest)
            if tail is None:
                break
            form = _FORMS[tail["form"]] if tail["form"] else form
            stated = int(tail["vram"] or 0)
            vram = stated if 0 < stated <= _LARGEST_GB else _HOSTS.get(stated, vram)
            rest = rest[tail.end() :]
        if not rest:
            if chip.name == "H100" and form is None and "hbm3" in spelled:
                form = "SXM"  # NVML calls the SXM board "H100 80GB HBM3", the others by their form
            return _Reading(chip, form if form in chip.forms else None, vram)
    return None


@lru_cache(_SPELLINGS)
def recognise(text: str, vram_gb: int | None = None) -> Model | None:
    """The model that a vendor's spelling means; `vram_gb` decides where the spelling does not. None: unknown to us.

    A card that is sold with far less memory than its model's nominal figure keeps its own: an agent plans by it.
    """
    reading = _read(text)
    if reading is None:
        return None
    size = reading.vram_gb or vram_gb
    fitting = [m for m in models().values() if m.chip == reading.chip.name and m.form == reading.form]
    model = min(fitting, key=lambda m: abs(m.vram_gb - size) if size else 0)
    return replace(model, vram_gb=size) if size and size < _LEAST_SHARE * model.vram_gb else model


def ask(text: str) -> list[str]:
    """The names of all models that a question such as `h100` or `A100-80G` means; empty when it means none."""
    reading = _read(text)
    if reading is None:
        return []
    return [
        m.name
        for m in models().values()
        if m.chip == reading.chip.name
        and reading.form in (None, m.form)
        and (reading.vram_gb is None or len(reading.chip.vram_gb) == 1 or m.vram_gb == reading.vram_gb)
    ]


def nearest(text: str) -> str | None:
    """The model whose name is most like this text."""
    from difflib import get_close_matches  # noqa: PLC0415 - only needed when something is wrong

    spelled = {compact(name): name for name in models()} | {s: chip.name for s, chip in _spellings()}
    near = get_close_matches(compact(text), list(spelled), n=1, cutoff=0.5)
    return spelled[near[0]] if near else None
