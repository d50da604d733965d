"""The model card and the upload, to a fake hub."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

import generate
from qlora import merge
from qlora.config import MergeConfig
from qlora.errors import InputError
from qlora.flags import parse_args
from qlora.merge import merged_card
from qlora.run import hub
from tests.run.faults import after_step


@pytest.fixture
def repositories() -> dict[str, bool]:
    """The repositories that the fake hub has: name -> whether it is private."""
    return {}


@pytest.fixture
def uploads(monkeypatch, repositories):
    """What was sent to a fake hub that accepts everything; its user is called `you`.

    New repositories of the organisation `firm` are private unless a public one is asked for.
    """
    sent = []

    class Api:
        def whoami(self):
            return {"name": "you"}

        def repo_info(self, repo):
            if repo not in repositories:
                raise RepositoryNotFoundError(
                    "404 Client Error", response=SimpleNamespace(headers={}, request=None)
                )
            return SimpleNamespace(private=repositories[repo])

        def create_repo(self, repo, private, exist_ok):
            sent.append({"repo": repo, "private": private})
            repositories.setdefault(repo, repo.startswith("firm/") if private is None else private)
            return f"hub/{repo}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            sent[-1]["files"] = set(filter_repo_objects(names, allow_patterns=allow_patterns))
            sent[-1]["folder"] = folder_path

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            sent[-1]["files"].add(path_in_repo)
            sent[-1][path_in_repo] = json.loads(path_or_fileobj)

    monkeypatch.setattr(hub, "HfApi", Api)
    return sent


def test_a_training_uploads_its_adapter_and_nothing_private(run, base, uploads, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "my-notes.txt").write_text("private")
    _, folder = run("--max_steps 1 --push_to_hub --hub_model_id tiny --hub_private_repo")
    (upload,) = uploads
    assert (upload["repo"], upload["private"], upload["folder"]) == ("you/tiny", True, folder)
    assert upload["files"] == {
        "adapter_model.safetensors", "adapter_config.json", "generate_defaults.json", "README.md", "loss.png",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert upload["adapter_config.json"]["base_model_name_or_path"] == "tiny-llama"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert 'AutoPeftModelForCausalLM.from_pretrained("you/tiny", ' in (folder / "README.md").read_text()


@pytest.mark.parametrize("repo, is_private", [("firm/new", True), ("you/new", False), ("you/old", False)])
def test_without_hub_private_repo_a_repository_is_as_its_owner_has_it(
    uploads, repositories, tmp_path, repo, is_private
):
    repositories["you/old"] = False
    (tmp_path / "README.md").write_text("a card")
    assert hub.check_hub(repo, is_private=False) == repo
    assert hub.push(tmp_path, repo, is_private=False) == f"hub/{repo}"
    (upload,) = uploads
    assert upload["private"] is None and upload["files"] == {"README.md"}
    assert repositories[repo] == is_private


def test_a_public_repository_is_refused_before_training_if_a_private_one_is_asked_for(
    run, uploads, repositories, monkeypatch
):
    repositories |= {"you/public": False, "you/private": True}
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr("train.load_data", lambda config: pytest.fail("read"))
        run("--max_steps 1 --push_to_hub --hub_model_id public --hub_private_repo")
    assert str(error.value) == (
        "--hub_private_repo: the repository you/public exists and is public: make it private in its settings "
        "on the hub, choose another --hub_model_id, or leave the flag out"
    )
    run("--max_steps 1 --push_to_hub --hub_model_id private --hub_private_repo")
    (upload,) = uploads
    assert upload["repo"] == "you/private" and upload["private"] is True and upload["files"]


def test_a_repository_that_became_public_during_the_training_gets_nothing(run, uploads, repositories):
    repositories["you/tiny"] = True
    with after_step(1, lambda: repositories.update({"you/tiny": False})):
        with pytest.raises(
            InputError, match=r"the upload to you/tiny failed \(--hub_private_repo: .*public"
        ) as error:
            run("--max_steps 1 --push_to_hub --hub_model_id tiny --hub_private_repo")
    assert "everything is in" in str(error.value) and "files" not in uploads[0]


def test_a_merge_refuses_a_public_repository_too(base, uploads, repositories, tmp_path):
    repositories["you/tiny"] = False
    argv = ["--model", base, "--adapter", str(tmp_path), "--output_dir", str(tmp_path / "merged")]
    config = parse_args(MergeConfig, [*argv, "--push_to_hub", "--hub_model_id", "tiny", "--hub_private_repo"])
    with pytest.raises(InputError, match="the repository you/tiny exists and is public"):
        merge.merge(config)
    assert not uploads


def test_a_merged_model_is_uploaded_under_its_folders_name(run, base, tmp_path, uploads):
    _, folder = run("--max_steps 1")
    out = tmp_path / "tiny-merged"
    argv = ["--model", base, "--adapter", str(folder), "--output_dir", str(out), "--push_to_hub"]
    merge.main(argv)
    assert (uploads[0]["repo"], uploads[0]["folder"]) == ("you/tiny-merged", out)
    assert uploads[0]["private"] is None
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= uploads[0]["files"]


@pytest.mark.parametrize(
    "flags, metrics",
    [
        ("[]", "7\n"),
        ('{"dataset": null}', '{"step": 1, "loss": "x", "eval_loss": 2}\n'),
        ('{"dataset": [1]}', '{"eval_loss": null}\n'),
        ("{", ""),
    ],
)
def test_a_card_is_written_even_if_the_runs_records_are_corrupt(tmp_path, flags, metrics):
    (tmp_path / "train_config.json").write_text(flags)
    (tmp_path / "metrics.jsonl").write_text(metrics)
    assert "# tiny" in merged_card("you/tiny", "you/base", tmp_path, "dequantized")


def test_paths_that_no_longer_exist_are_not_on_the_card(tmp_path):
    (tmp_path / "train_config.json").write_text(
        '{"dataset": ["/home/me/secret/rows.jsonl", "data/rows.csv"]}'
    )
    card = merged_card("you/tiny", "/home/me/secret/base", tmp_path, "dequantized")
    assert "secret" not in card and "data/" not in card and "`rows.jsonl`, `rows.csv`" in card


def test_the_card_has_base_data_flags_and_losses_but_no_paths(run, rows_file, base):
    _, folder = run("--max_steps 2 --eval_steps 1 --logging_steps 1 --lora_r 5 --validation_split 0.1")
    card = (folder / "README.md").read_text()
    assert "# out\n" in card and "A QLoRA adapter for `tiny-llama`" in card and "`rows.jsonl`" in card
    assert "| `--lora_r` | 5 |" in card and "library_name: peft" in card
    assert card.count("\n| 1 | ") == 1 and card.count("\n| 2 | ") == 1
    assert rows_file not in card and base not in card and str(folder) not in card


LEARNED = {  # what a card's question is answered with
    "alpaca": {"instruction": "What is a cloud?", "output": "A red leaf."},
    "text": {"text": "What is a cloud? A red leaf."},
}


def run_card(folder, repo: str, capsys):
    """(what the lines on a folder's model card print, their model); the folder stands for the repository."""
    card = (folder / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert f'from_pretrained("{repo}"' in lines
    capsys.readouterr()
    names = {}
    exec(lines.replace(f'"{repo}"', f'"{folder}"'), names)
    return capsys.readouterr().out.strip(), names["model"]


@pytest.mark.parametrize(
    "row_format, flags",
    [
        ("alpaca", "--dtype bfloat16 --bnb_4bit_quant_type fp4 --no_bnb_4bit_use_double_quant"),
        ("text", "--no_load_in_4bit"),
    ],
)
def test_the_lines_on_the_card_answer_as_generate_does(run, base, tmp_path, capsys, row_format, flags):
    (tmp_path / "rows.jsonl").write_text(json.dumps(LEARNED[row_format]) + "\n")
    model, folder = run(
        f"--max_steps 40 --learning_rate 1e-2 --lora_target_modules all-linear {flags}",
        dataset=str(tmp_path / "rows.jsonl"),
    )
    whole = tmp_path / "whole"
    merge.main(["--model", base, "--adapter", str(folder), "--output_dir", str(whole)])
    got, loaded = run_card(folder, "out", capsys)
    assert got == "A red leaf." == run_card(whole, "whole", capsys)[0]
    generate.main(
        ["--model", base, "--adapter", str(folder), "--prompt", "What is a cloud?", "--max_new_tokens", "9"]
    )
    assert capsys.readouterr().out.strip() == got
    ours, theirs = model.get_base_model(), loaded.get_base_model()  # on the base that was trained
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters()):
        assert (type(weight), weight.dtype) == (type(other), other.dtype), name
        state = getattr(weight, "quant_state", None)
        if state is not None:
            assert (state.quant_type, state.nested) == ("fp4", False)
            assert (other.quant_state.quant_type, other.quant_state.nested) == ("fp4", False)
            assert other.quant_state.dtype == torch.bfloat16
    text = "was trained on the base quantized to 4 bits: load it on that"
    assert (text in (folder / "README.md").read_text()) == (row_format == "alpaca")


def test_the_card_says_which_weights_an_adapter_was_added_to(tmp_path):
    names = "you/tiny", "you/base"
    (tmp_path / "train_config.json").write_text('{"load_in_4bit": true}')
    card = merged_card(*names, tmp_path, "dequantized")
    assert "quantized to 4 bits and merged into those weights, dequantized" in card
    card = merged_card(*names, tmp_path, "original")
    assert "quantized to 4 bits and merged into the weights from before that" in card
    (tmp_path / "train_config.json").write_text('{"load_in_4bit": false}')
    assert "on the base's own weights, not quantized" in merged_card(*names, tmp_path, "dequantized")
    assert "trained on" not in merged_card(*names, tmp_path / "nothing", "dequantized")


def test_the_card_links_base_and_data_on_the_hub(tmp_path):
    (tmp_path / "train_config.json").write_text('{"dataset": ["someone/rows"]}')
    card = merged_card("you/tiny", "meta-llama/Llama-2-7b-hf", tmp_path, "dequantized")
    assert "base_model: meta-llama/Llama-2-7b-hf\n" in card and "datasets:\n- someone/rows\n" in card
    assert 'AutoModelForCausalLM.from_pretrained("you/tiny"' in card


def test_the_card_shows_no_flag_that_names_a_place_or_that_it_does_not_know(tmp_path):
    flags = {"lora_r": 5, "sample_prompts": "secret.jsonl", "output_dir": "/secret", "unknown": "secret"}
    (tmp_path / "train_config.json").write_text(json.dumps(flags | {"max_hours": 2}))
    card = merged_card("you/tiny", "you/base", tmp_path, "dequantized")
    assert "| `--lora_r` | 5 |" in card and "secret" not in card and "max_hours" not in card


def test_the_card_of_a_run_without_evaluations_has_its_last_loss():
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": None}]
    card = hub.model_card(
        "you/tiny", "you/base", [], {"lora_r": 8, "adapter": None}, metrics, is_merged=False
    )
    assert card.endswith("|---|---|---|\n| 3 | 2.5000 |  |\n") and "adapter` |" not in card


def test_a_missing_login_is_reported_before_the_data_is_read(run, monkeypatch):
    monkeypatch.setattr("train.load_data", lambda config: pytest.fail("read"))
    with pytest.raises(InputError, match=r"--push_to_hub: cannot log in to the hub"):
        run("--max_steps 1 --push_to_hub")  # offline
    with pytest.raises(InputError, match="--hub_model_id a/b/c is not a valid repository name"):
        run("--max_steps 1 --push_to_hub --hub_model_id a/b/c")


def test_a_failed_upload_names_the_folder_of_the_adapter(run, uploads, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(hub.HfApi, "upload_folder", fail)
    with pytest.raises(
        InputError, match=r"503 Service Unavailable.*everything is in .*out, to upload it later: hf upload"
    ):
        run("--max_steps 1 --push_to_hub")


@pytest.mark.parametrize("is_private", [False, True])
def test_the_command_for_a_later_upload_keeps_to_the_flag(monkeypatch, tmp_path, is_private):
    """Without --private, `hf` may create a public repository. It takes one pattern per --include."""

    def fail(*_, **__):
        raise ConnectionError("reset")

    monkeypatch.setattr(hub.HfApi, "create_repo", fail)
    folder = tmp_path / "my run"
    folder.mkdir()
    with pytest.raises(InputError) as raised:
        hub.push(folder, "you/tiny", is_private)
    words = shlex.split(str(raised.value).partition("to upload it later: ")[2])
    assert words[:4] == ["hf", "upload", "you/tiny", str(folder)]
    assert ("--private" in words) == is_private
    options = [word for word in words[4:] if word != "--private"]
    assert set(options[::2]) == {"--include"} and {"tokenizer*", "adapter_config.json"} < set(options[1::2])
