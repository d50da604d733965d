"""train.py --data_report: what it prints and writes, and its exit code."""

import json
import subprocess
import sys

import pytest

import train
from tests.conftest import ROOT, ROWS


def command(base, rows_file, tmp_path, *flags):
    argv = ["--model", base, "--dataset", rows_file, "--output_dir", str(tmp_path / "out"), *flags]
    return subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_the_command_prints_the_report_and_trains_nothing(base, rows_file, tmp_path):
    result = command(base, rows_file, tmp_path, "--data_report", "--validation_split", "4")
    assert result.returncode == 0, result.stderr
    assert "train: 38 rows read = 38 used + 0 dropped" in result.stdout and "⟦" in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_report_lists_the_files_of_a_folder_that_are_read_and_left_out(base, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in ("rows.jsonl", "test.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps(ROWS[0]) + "\n")
    argv = ["--model", base, "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    line = f"{tmp_path / 'data'}: 1 file read: rows.jsonl; left out: 1 of split test: test.jsonl"
    for kind in ("text", "json"):
        with pytest.raises(SystemExit, match="0"):
            train.main([*argv, "--data_report", kind])
        shown = capsys.readouterr().out
        assert line in (json.loads(shown)["train"]["files"] if kind == "json" else shown)


def test_the_report_as_json_with_its_picture(base, rows_file, tmp_path):
    result = command(base, rows_file, tmp_path, "--data_report", "json", "--max_length", "24")
    report = json.loads(result.stdout)  # nothing else is printed there
    assert result.returncode == 0 and report["train"]["rows_read"] == 42 and report["max_length"] == 24
    assert json.loads((tmp_path / "out" / "data_report.json").read_text()) == report
    assert (tmp_path / "out" / "data_report.png").read_bytes().startswith(b"\x89PNG")


def test_data_that_would_ruin_a_run_gives_exit_code_1(base, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "Once upon a time a red leaf fell from a very old tree"}))
    flags = ["--model", base, "--dataset", str(path), "--max_length", "8", "--data_report"]
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 1
    assert "PROBLEM no row trains the end-of-sequence token" in capsys.readouterr().out


def test_an_adapter_that_does_not_exist_is_an_error_of_the_report_too(base, rows_file):
    with pytest.raises(SystemExit, match=r"train\.py: error: --adapter nowhere is no adapter folder"):
        train.main(["--model", base, "--dataset", rows_file, "--adapter", "nowhere", "--data_report"])
