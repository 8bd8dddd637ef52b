import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from project import arguments, cli

ROOT = Path(__file__).parent.parent
LIGHT = ["project.cli", "project.data", "project.data.manifest", "project.data.images", "project.models", "project"]


def python(*words, **options):
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=options.pop("cwd", ROOT), check=False, **options
    )


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main([]) == 0
    assert capsys.readouterr().out == out


def test_mistyped_verb_is_recognised(refused):
    assert "There is no verb fti. Did you mean fit?" in refused("fti")
    assert "no verb xyzzy. The verbs are fit" in refused("xyzzy")


def test_option_before_the_verb_gets_the_right_order(refused):
    sentence = refused("--data.root", "photos", "test")
    assert "Options come after the verb: python -m project.cli test --data.root" in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.rot", "x"], "no option --data.rot. Did you mean --data.root?"),
        (["--trainer.max_epoch=3"], "Did you mean --trainer.max_epochs?"),
        (["stray"], "no place for the word stray"),
        (["--trainer.max_epochs", "many"], "--trainer.max_epochs is many; it takes int or null"),
        (["--data.resize", "squash"], "--data.resize is squash; it takes stretch or crop or pad"),
        (["--patience", "x"], "--patience is x; it takes PositiveInt or null"),
        (["--average", "3"], "--average is 3; it must be above 0 and below 1"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--data.root"], "--data.root"),
        (["--model.name", "alexnot"], "alexnet"),
        (["--model.positive", "7"], "one of two classes"),
        (["--model.lr", "-1"], "--model.lr is -1; it must be above 0"),
        (["--model.warmup", "3"], "--model.warmup is 3; it must be at least 0 and below 1"),
        (["--seed_everything", "-1"], "is -1; it must be at least 0"),
        (["--trainer.strategy", "nonsense"], "The Trainer refuses its options"),
        (["--trainer.max_epochs", "0"], "nothing to train"),
        (["--help", "--model.lrr"], "There is no option --model.lrr. Did you mean --model.lr?"),
    ],
)
def test_mistakes_get_one_sentence(workplace, refused, words, sentence):
    assert sentence in refused("fit", *words)
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
    assert cli.main(["fit", "--help", "--model.lr"]) == 0
    (first, *more) = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["--model.lr", "LR"]
    assert " ".join(" ".join(more).split()) == "(type: PositiveFloat | null, default: null)"
    assert cli.main(["fit", "--help", "--trainer.max_epochs"]) == 0
    assert "To enable infinite training" in " ".join(capsys.readouterr().out.split())
    for group in ("trainer", "--trainer"):
        assert cli.main(["fit", "--help", group]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {"--trainer.max_epochs", "--trainer.devices", "--trainer.callbacks"} < {
            line.split()[0] for line in lines
        }
        assert len(lines) < 60
    assert cli.main(["fit", "--trainer.callbacks.help", "EarlyStopping"]) == 0
    assert "--trainer.callbacks.patience" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_options_may_be_spelt_with_dashes(verb):
    parser = arguments.Parser()
    parser.add_function_arguments(getattr(importlib.import_module(f"project.commands.{verb}"), verb))
    options = [option for action in arguments.actions(parser) for option in action.option_strings]
    for option in (option for option in options if "_" in option):
        dashed = "--" + option[2:].replace("_", "-")
        words = [dashed, f"{dashed}=a-b_c", "a-b", dashed[1:]]
        assert arguments.with_underscores(words, options) == [option, f"{option}=a-b_c", "a-b", dashed[1:]]


def test_dashes_reach_the_function():
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


def test_yaml_that_does_not_parse_and_unknown_keys_in_it(workplace, refused):
    Path("bad.yaml").write_text("data: [1\n model: {")
    assert "line 2" in refused("fit", "--config", "bad.yaml")
    Path("unknown.yaml").write_text("data:\n  rooot: photos\n")
    assert "data.rooot, which does not exist. Did you mean --data.root?" in refused("fit", "--config", "unknown.yaml")


def test_ctrl_c_before_a_fit_has_begun_exits_with_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["fit"]) == 130


def test_bugs_of_ours_keep_their_traceback(monkeypatch):
    def broken(argv):
        raise ValueError("ours")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(ValueError, match="ours"):
        cli.main(["fit"])


@pytest.mark.parametrize("words", [["--help"], ["fti"], ["--data.root", "x", "fit"], ["predict", "--help"]])
def test_quick_answers_import_no_torch(words):
    code = f"import sys; from project import cli; code = cli.main({words!r}); print(code, 'torch' in sys.modules)"
    assert python("-c", code).stdout.splitlines()[-1] in ("0 False", "2 False")


def test_light_modules_import_no_torch():
    code = f"import sys, {', '.join(LIGHT)}; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0


def test_both_ways_to_start_it_and_exit_codes_of_the_process():
    for module in ("project", "project.cli"):
        assert python("-m", module, "--help").returncode == 0
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


def test_another_broken_pipe_keeps_its_traceback(monkeypatch, capsys):
    def broken(argv):
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(cli, "_run", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main(["fit"])
