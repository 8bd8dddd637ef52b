import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from project import cli, usage

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


def test_option_before_the_verb_is_put_right(refused):
    said = refused("--data.root", "photos", "test")
    assert "Options come after the verb: python -m project.cli test --data.root" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.rot", "x"], "no option --data.rot. Did you mean --data.root?"),
        (["--trainer.max_epoch=3"], "Did you mean --trainer.max_epochs?"),
        (["stray"], "no place for the word stray"),
        (["--trainer.max_epochs", "many"], "--trainer.max_epochs is many; it takes int or null"),
        (["--data.resize", "squash"], "--data.resize is squash; it takes stretch or crop or pad"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--data.root"], "--data.root"),
        (["--model.name", "alexnot"], "alexnet"),
        (["--model.positive", "7"], "one of two classes"),
        (["--model.lr", "-1"], "--model.lr is -1.0; it must be above 0"),
        (["--model.warmup", "3"], "--model.warmup is 3.0; it must be from 0 to below 1"),
        (["--seed_everything", "-1"], "-1 does not conform to restriction v>=0"),
        (["--trainer.strategy", "nonsense"], "The Trainer refuses its options"),
        (["--trainer.max_epochs", "0"], "nothing to train"),
    ],
)
def test_words_nobody_knows_get_one_sentence(workplace, refused, words, said):
    assert said in refused("fit", *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_options_may_be_spelt_with_dashes(verb, capsys):
    parser = usage.Parser()
    module = importlib.import_module(f"project.{cli.COMMANDS[verb][0]}")
    parser.add_function_arguments(getattr(module, verb))
    options = [word for word in usage._options(parser) if "_" in word]
    for option in options:
        dashed = "--" + option[2:].replace("_", "-")
        assert usage.spelt([dashed, f"{dashed}=a-b_c", "a-b", dashed[1:]], options) == [
            option,
            f"{option}=a-b_c",
            "a-b",
            dashed[1:],
        ]


def test_dashes_reach_the_function():
    def verb(picture: str, /, min_confidence: float = 0.0, with_a_flag: bool = False) -> int:
        """Does something.

        Args:
            picture: A file.
            min_confidence: A number.
            with_a_flag: Or not.
        """
        seen.append((picture, min_confidence, with_a_flag))
        return 0

    seen = []
    for words in (["a-b", "--min-confidence", "0.5", "--with-a-flag"], ["a-b", "--min_confidence=0.5"]):
        assert usage.call(verb, "verb", words) == 0
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
