"""GPU models as vendors really write them, taken from the vendors' own API descriptions."""

from pathlib import Path

import pytest

from gpubroker import gpus

SPECS = Path(__file__).parents[3] / "shared" / "providers" / "specs"

SPELLINGS: dict[str, dict[str, tuple[str, int] | None]] = {
    "primeintellect-compute.dedup.yaml": {
        "A10_24GB": ("A10", 24), "A100_80GB": ("A100 80GB", 80), "A100_40GB": ("A100 40GB", 40), "A30_24GB": ("A30", 24),
        "A40_48GB": ("A40", 48), "B200_180GB": ("B200", 180), "B300_262GB": ("B300", 288), "GB200": ("GB200", 192),
        "GB300": ("GB300", 288), "RTX3070_8GB": ("RTX 3070", 8), "RTX3080_10GB": ("RTX 3080", 10),
        "RTX3080Ti_12GB": ("RTX 3080 Ti", 12), "RTX3090_24GB": ("RTX 3090", 24), "RTX3090Ti_24GB": ("RTX 3090 Ti", 24),
        "RTX4070Ti_12GB": ("RTX 4070 Ti", 12), "RTX4080_16GB": ("RTX 4080", 16), "RTX4080Ti_16GB": None,  # never made
        "RTX4090_24GB": ("RTX 4090", 24), "RTX5090_32GB": ("RTX 5090", 32), "H100_80GB": ("H100", 80), "H200_96GB": ("H200", 96),
        "GH200_96GB": ("GH200 96GB", 96), "H200_141GB": ("H200", 141), "GH200_480GB": ("GH200 96GB", 96),
        "GH200_624GB": ("GH200 144GB", 144), "L4_24GB": ("L4", 24), "L40_48GB": ("L40", 48), "L40S_48GB": ("L40S", 48),
        "RTX4000_8GB": ("Quadro RTX 4000", 8), "RTX5000_16GB": ("Quadro RTX 5000", 16), "RTX6000_24GB": ("Quadro RTX 6000", 24),
        "RTX8000_48GB": ("Quadro RTX 8000", 48), "RTX2000Ada_16GB": ("RTX 2000 Ada", 16), "RTX4000Ada_20GB": ("RTX 4000 Ada", 20),
        "RTX5000Ada_32GB": ("RTX 5000 Ada", 32), "RTX6000Ada_48GB": ("RTX 6000 Ada", 48), "A2000_6GB": ("RTX A2000", 6),
        "A4000_16GB": ("RTX A4000", 16), "A4500_20GB": ("RTX A4500", 20), "A5000_24GB": ("RTX A5000", 24),
        "A6000_48GB": ("RTX A6000", 48), "V100_16GB": ("V100 16GB", 16), "V100_32GB": ("V100 32GB", 32), "P100_16GB": ("P100", 16),
        "T4_16GB": ("T4", 16), "P4_8GB": ("P4", 8), "P40_24GB": ("P40", 24), "RTX_PRO_6000B_96GB": ("RTX PRO 6000", 96),
        "CPU_NODE": None,
    },
    "runpod-rest-v2.json": {
        "NVIDIA GeForce RTX 4090": ("RTX 4090", 24), "NVIDIA L40": ("L40", 48), "NVIDIA RTX 4090": ("RTX 4090", 24),
        "NVIDIA H100 80GB HBM3": ("H100 SXM", 80), "NVIDIA GeForce RTX 5090": ("RTX 5090", 32),
        "NVIDIA H100 PCIe": ("H100 PCIe", 80),
    },
    "vastai.yaml": {
        "RTX_3090": ("RTX 3090", 24), "RTX_4090": ("RTX 4090", 24), "RTX 4090": ("RTX 4090", 24), "RTX 5090": ("RTX 5090", 32),
        "RTX A5000": ("RTX A5000", 24), "H100_SXM": ("H100 SXM", 80), "Imaginary RTX 9999": None,
    },
    "lambda.json": {
        "gpu_8x_a100": ("A100 80GB", 80), "gpu_1x_a10": ("A10", 24), "gpu_8x_h100_sxm5gdr": ("H100 SXM", 80),
        "8x H100 (80 GB SXM5)": ("H100 SXM", 80), "H100 (80 GB SXM5)": ("H100 SXM", 80), "gpu_8x_example": None,
    },
    "shadeform.yaml": {
        "A100_80G": ("A100 80GB", 80), "A100": ("A100 80GB", 80), "gpu_1x_a6000": ("RTX A6000", 48), "A6000": ("RTX A6000", 48),
        "H100_sxm5x8": ("H100 SXM", 80), "H100_80GB_SXM_8x": ("H100 SXM", 80), "H100": ("H100", 80),
    },
    "crusoe-v1.json": {
        "a100.1x": ("A100 80GB", 80), "a40.2x": ("A40", 48), "h200-141gb-sxm-ib.8x": ("H200 SXM", 141),
        "gb200-186gb-nvl-ib.4x": ("GB200", 192), "h100-80gb-sxm-ib.8x": ("H100 SXM", 80), "A40 PCIe": ("A40", 48),
        "2x Nvidia A100": ("A100 80GB", 80), "Nvidia H100": ("H100", 80), "Nvidia L40S": ("L40S", 48),
    },
    "digitalocean.json": {
        "gpu-h100x1-80gb": ("H100", 80), "gpu-h100x8-640gb": ("H100", 80), "gpu-mi300x1-192gb": ("MI300X", 192),
        "nvidia_h100": ("H100", 80), "H100 GPU - 1X": ("H100", 80),
    },
    "hotaisle.json": {"MI300X": ("MI300X", 192)},
    "thundercompute.json": {"H100": ("H100", 80)},
}  # fmt: skip
"""By file, each spelling that stands in it: the model's name and memory, or None where it names no model."""


def test_every_vendors_spelling_is_the_model_that_it_means(subtests: pytest.Subtests):
    for file, spellings in SPELLINGS.items():
        for text, meant in spellings.items():
            with subtests.test(file=file, text=text):
                model = gpus.recognise(text)
                assert (None if model is None else (model.name, model.vram_gb)) == meant
                assert (gpus.ask(text) == []) == (meant is None)
                assert meant is None or meant[0] in gpus.ask(text)
    assert sum(len(spellings) for spellings in SPELLINGS.values()) > 80


def test_the_figure_of_a_vendor_decides_only_where_its_spelling_does_not():
    for text, vram, meant in (
        ("A100", 40, ("A100 40GB", 40)), ("A100_80GB", 40, ("A100 80GB", 80)), ("H100 PCIe", 79, ("H100 PCIe", 80)),
        ("L4", 22, ("L4", 24)), ("RTX 4060 Ti", 8, ("RTX 4060 Ti", 8)), ("gpu-h100x8", 640, ("H100", 80)),
        ("GH200", 144, ("GH200 144GB", 144)),
    ):  # fmt: skip
        model = gpus.recognise(text, vram)
        assert model is not None
        assert (model.name, model.vram_gb) == meant


@pytest.mark.skipif(not SPECS.is_dir(), reason="the vendors' API descriptions are not here")
def test_the_spellings_stand_in_the_vendors_own_descriptions():
    for file, spellings in SPELLINGS.items():
        text = (SPECS / file).read_text()
        assert [spelling for spelling in spellings if spelling not in text] == [], file
