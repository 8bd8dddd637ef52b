import subprocess
import sys
from pathlib import Path

import pytest

from project import arguments, cli

ROOT = Path(__file__).parent.parent
LIGHT = ["project.cli", "project.data", "project.data.manifest", "project.data.images", "project.models", "project"]


def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False)


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fti"], "There is no verb fti. Did you mean fit?"),
        (["xyzzy"], "no verb xyzzy. The verbs are fit"),
        (["--data.root", "photos", "test"], "Options come after the verb: python -m project.cli test --data.root"),
        (["fit", "--data.rot", "x"], "no option --data.rot. Did you mean --data.root?"),
        (["fit", "--trainer.max_epoch=3"], "Did you mean --trainer.max_epochs?"),
        (["fit", "stray"], "unrecognized arguments: stray"),
        (["fit", "--trainer.max_epochs", "many"], "--trainer.max_epochs is many; it takes int or null"),
        (["fit", "--model.optimizer", "lamb"], "--model.optimizer is lamb; it takes adam or adamw or sgd"),
        (["fit", "--patience", "x"], "--patience is x; it takes PositiveInt or null"),
        (["fit", "--patience", "0"], "--patience is 0; it must be above 0"),
        (["fit", "--patience", "3", "--trainer.limit_val_batches", "0"], "--patience needs validations"),
        (["fit", "--average", "1"], "--average is 1; it must be above 0 and below 1"),
        (["fit", "--config", "none.yaml"], "none.yaml"),
        (["fit", "--config", "bad.yaml"], "line 2"),
        (["fit", "--config", "unknown.yaml"], "no option --data.rooot. Did you mean --data.root?"),
        (["fit", "--data.root"], "--data.root"),
        (["fit", "--model.name", "alexnot"], "alexnet"),
        (["fit", "--model.positive", "7"], "one of two classes"),
        (["fit", "--model.weight_decay", "-1"], "--model.weight_decay is -1; it must be at least 0"),
        (["fit", "--model.warmup", "3"], "--model.warmup is 3; it must be at least 0 and at most 1"),
        (["fit", "--trainer.strategy", "nonsense"], "The Trainer refuses its options"),
        (["fit", "--trainer.max_epochs", "0"], "nothing to train"),
        (["fit", "--help", "--model.lrr"], "There is no option --model.lrr. Did you mean --model.lr?"),
    ],
)
def test_mistakes_get_one_sentence(workplace, refused, words, sentence):
    Path("bad.yaml").write_text("data: [1\n model: {")
    Path("unknown.yaml").write_text("data:\n  rooot: photos\n")
    assert sentence in refused(*words)
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", cli.TRAINER_VERBS)
def test_help_has_one_line_for_each_own_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: python -m project.cli {verb} [options]"
    assert len(lines) < 120
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--seed_everything", "--ckpt_path", "--data.root", "--model.lr"} < set(names)
    assert not [name for name in names if name.startswith("--trainer")]
    assert names.index("--ckpt_path") < names.index("--data.root") < names.index("--model.name")
    assert ("--steps" in names) == ("--plot" in names) == (verb == "tune")
    assert "--help trainer" in lines[-1]


def test_help_explains_an_option_in_full_and_lists_the_trainers_on_request(capsys):
    def help_on(*words):
        assert cli.main(["fit", *words]) == 0
        return capsys.readouterr().out

    assert " ".join(help_on("--help", "--model.lr").split()).endswith("(type: PositiveFloat | null, default: null)")
    assert "To enable infinite training" in " ".join(help_on("--help", "--trainer.max_epochs").split())
    assert "--trainer.callbacks.patience" in help_on("--trainer.callbacks.help", "EarlyStopping")
    for group in ("trainer", "--trainer"):
        lines = help_on("--help", group).splitlines()
        assert {"--trainer.max_epochs", "--trainer.devices"} < {line.split()[0] for line in lines}
        assert len(lines) < 60


def test_options_reach_the_function_with_dashes_too_and_flags_take_no_value():
    def verb(image: str, /, min_confidence: float = 0.0, with_a_flag: bool = False) -> int:
        """Does something.

        Args:
            image: A file.
            min_confidence: A number.
            with_a_flag: Or not.
        """
        seen.append((image, min_confidence, with_a_flag))
        return 0

    seen = []
    for words in (["a-b", "--min-confidence", "0.5", "--with-a-flag"], ["a-b", "--min_confidence=0.5"]):
        assert arguments.call(verb, "verb", words) == 0
    assert seen == [("a-b", 0.5, True), ("a-b", 0.5, False)]


def test_bugs_of_ours_keep_their_traceback_and_ctrl_c_does_not(monkeypatch, capsys):
    errors = [KeyboardInterrupt, BrokenPipeError("of a worker"), ValueError("ours")]

    def broken(argv):
        raise errors.pop()

    monkeypatch.setattr(cli, "_run", broken)
    for kind in (ValueError, BrokenPipeError):
        with pytest.raises(kind):
            cli.main(["fit"])
    assert cli.main(["fit"]) == 130


@pytest.mark.parametrize("words", [["--help"], ["fti"], ["--data.root", "x", "fit"], ["predict", "--help"]])
def test_quick_answers_and_light_modules_import_no_torch(words):
    code = f"import sys, {', '.join(LIGHT)}; code = project.cli.main({words!r}); print(code, 'torch' in sys.modules)"
    assert python("-c", code).stdout.splitlines()[-1] in ("0 False", "2 False")


def test_both_ways_to_start_it_and_exit_codes_of_the_process():
    assert python("-m", "project", "--help").returncode == 0
    wrong = python("-m", "project.cli", "fti")
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["models"], 141), (["--help"], 141), (["predict", "--help"], 0)],  # argparse itself ignores the closed pipe
)
def test_closed_pipe_ends_a_verb_quietly(words, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "project", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.close()  # as `| head` does after some lines
    assert process.communicate()[1] == b""
    assert process.returncode == code
