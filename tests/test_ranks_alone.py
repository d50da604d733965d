"""What happens to the others when one process alone fails, is killed, or was started otherwise."""

import os
import signal

import pytest
import torch

from qlora.run.checkpoint import list_checkpoints
from tests.results import metrics
from tests.test_ranks import ENDLESS, STEPS, split

FUNCTIONS = "tests.test_ranks_alone"


def is_second() -> bool:
    return os.environ["RANK"] == "1"


def best_before_last(argv: list[str]) -> None:
    """train.py, with validation losses that rise."""
    import train
    from qlora.evaluation.validation import Validation

    losses = iter([1.0, 2.0, 3.0])
    Validation.loss = lambda *arguments: next(losses)
    train.main(argv)


def test_the_best_adapter_is_loaded_after_the_others_have_left(start_run, tmp_path, rows_file):
    flags = STEPS, split(2, 2), f"--validation_dataset {rows_file} --eval_steps 2 --load_best_model_at_end"
    run = start_run(2, *flags, function=f"{FUNCTIONS}:best_before_last")
    assert run.wait() == [0, 0], run.output()
    assert "the adapter is that of step 2, the best" in run.output()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def dies_in_its_fifth_pass(argv: list[str]) -> None:
    """train.py, in which the second process is killed in a forward pass."""
    import train
    from qlora.model import loss

    original, calls = loss.target_logprobs, []

    def target_logprobs(model, *arguments):
        calls.append(1)
        if len(calls) == 5 and is_second():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(model, *arguments)

    train.target_logprobs = target_logprobs
    train.main(argv)


def test_a_process_killed_while_the_others_gather_weights_from_it_costs_no_step(start_run, tmp_path):
    run = start_run(2, ENDLESS, "--shard", function=f"{FUNCTIONS}:dies_in_its_fifth_pass")
    assert run.wait() == [1, -9]
    assert run.output().count("error:") == 1 and "resumes after step 4" in run.output()
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == ["checkpoint-4"]


def dies_while_it_prepares_data(argv: list[str]) -> None:
    """train.py, in which the second process is killed while the first waits for its data."""
    import train

    original = train.load_data
    train.load_data = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if is_second() else original(*a)
    train.main(argv)


def test_a_process_killed_while_data_is_prepared_takes_the_others_down(start_run):
    run = start_run(3, ENDLESS, function=f"{FUNCTIONS}:dies_while_it_prepares_data")
    assert run.wait() == [1, -9, 1]
    assert run.output().count("error: another process has died or hangs") == 1


def has_one_gpu(argv: list[str]) -> None:
    """train.py on a host with one GPU, as far as it looks."""
    import train

    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.set_device = lambda device: None
    train.main([*argv, "--distributed_timeout", "3"])


def test_more_processes_than_gpus_are_refused_with_the_number_to_give(start_run):
    run = start_run(2, ENDLESS, function=f"{FUNCTIONS}:has_one_gpu")
    assert run.wait() == [1, 1]
    assert "this host has 1 GPUs, and torchrun has started 2 processes on it: give --nproc-per-node 1" in (
        run.output()
    )


@pytest.mark.parametrize(
    "flags, reason",
    [
        ("--learning_rate 0.{rank}1", "process 1 was started with another --learning_rate than process 0"),
        ("--per_device_train_batch_size 1{rank}", "another --per_device_train_batch_size than process 0"),
        ("--dataset {folder}/{rank}.jsonl", "process 1 has another data than process 0"),
    ],
)
def test_processes_started_differently_are_refused_by_name(start_run, tmp_path, rows_file, flags, reason):
    lines = open(rows_file).readlines()
    for rank in range(2):
        (tmp_path / f"{rank}.jsonl").write_text("".join(lines[rank:]))
    run = start_run(2, STEPS, split(2, 1), flags.replace("{folder}", str(tmp_path)))
    assert run.wait() == [1, 1]
    assert run.output().count("error:") == 1 and reason in run.output()


def test_what_only_the_first_process_can_find_out_is_printed_once(start_run, tmp_path):
    (tmp_path / "file").touch()
    run = start_run(2, STEPS, f"--output_dir {tmp_path}/file")
    assert run.wait() == [1, 1]
    assert run.output().count("error:") == 1 and "--output_dir" in run.output()


def runs_out_of_memory_in_samples(argv: list[str]) -> None:
    """train.py, with processes that run out of memory in their sample answers."""
    import train
    from qlora.evaluation import samples

    def generate(model, *arguments, **options):
        inputs = torch.arange(4)[None]
        layer = model.get_base_model().model.layers[1]
        layer.register_forward_pre_hook(fail, prepend=False)
        model(input_ids=inputs)

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    samples.generate = generate
    train.main(argv)


def test_with_shard_out_of_memory_in_sample_answers_does_not_end_the_run(start_run, tmp_path, rows_file):
    (tmp_path / "prompts.txt").write_text("What?\n")
    flags = STEPS, split(2, 1), f"--shard --validation_dataset {rows_file} --eval_steps 5"
    run = start_run(
        2, *flags, f"--sample_prompts {tmp_path}/prompts.txt --sample_max_new_tokens 4",
        function=f"{FUNCTIONS}:runs_out_of_memory_in_samples",
    )  # fmt: skip
    assert run.wait() == [0, 0], run.output()
    assert "no samples at this evaluation" in run.output()
    assert metrics(tmp_path / "out")[-1]["step"] == 5


def test_a_data_report_is_that_of_one_process(start_run, tmp_path):
    run = start_run(2, "--data_report json", out="report")
    assert run.wait() == [0, 0], run.output()
    assert run.output().count('"max_length"') == 1
