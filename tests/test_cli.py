import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from project import __version__, arguments, cli
from project.errors import command

LONG = "x" * 300
FILES = {
    "file": b"mine",
    **{f"bad/{number}.jpg": b"<html>" for number in range(9)},
    "bad.yaml": b"data: [1\n model: {",
    "home.yaml": b"data:\n  root: ~/none\n",
    "empty.yaml": b"data:\n  root: ''\n",
    "unknown.yaml": b"data:\n  rooot: photos\n",
    "binary": b"\x89PNG\r\n",
    "zip": b"PK\x03\x04",
    "nothing.csv": b"",
    "other.csv": b"file,label\na.png,x\n",
    "hole.csv": b"path,label\na.png,x\n,y\n",
    "bytes.csv": b"path\na\x00b.png\n" + b'"' + b"x" * 200_000,
    "heads.csv": b"path,label\n",
}
MISTAKES = [
    ("fti", "There is no verb fti. Did you mean fit?"),
    ("xyzzy", "no verb xyzzy. The verbs are fit"),
    ("--data.root photos test", "Options come after the verb: python -m project.cli test --data.root"),
    ("fit --data.rot x", "no option --data.rot. Did you mean --data.root?"),
    ("fit --trainer.max_epoch=3", "Did you mean --trainer.max_epochs?"),
    ("fit stray", "no folder stray; give a folder"),
    ("fit -- stray", "no folder stray; give a folder"),
    ("fit --print_config stray --data.root photos", "--data.root takes one value"),
    ("fit file", "file is neither a folder nor a CSV file"),
    ("fit ''", "An empty word is given for --data.root"),
    ("fit --data.root=", "An empty word is given for --data.root"),
    ("fit --config empty.yaml", "An empty word is given for --data.root"),
    ("fit --resume=", "An empty word is given for --resume"),
    ("test ''", "An empty word is given for --ckpt_path"),
    ("test --ckpt_path=", "An empty word is given for --ckpt_path"),
    ("predict run ''", "An empty word is given for images"),
    ("predict run photos --out ''", "An empty word is given for --out"),
    ("fit --pretrained", "Did you mean --model.weights?"),
    ("fit --trainer.limit_train_batches 0", "nothing to train"),
    ("fit stray --data.root photos", "--data.root takes one value"),
    ("validate stray", "no checkpoint stray"),
    ("test --trainer.devices 1 stray", "no checkpoint stray"),
    ("test run photos", "--ckpt_path takes one value"),
    ("test run --patience 3", "no option --patience. See --help."),
    ("fit --data.root=~/none", f"no folder {Path.home()}/none;"),
    ("fit --config home.yaml", f"no folder {Path.home()}/none;"),
    ("fit --lr 0.1", "no option --lr. Did you mean --model.lr?"),
    ("fit -lr 0.1", "Did you mean --model.lr?"),
    ("fit --learning-rate 0.1", "Did you mean --model.lr?"),
    ("fit --epochs=3", "no option --epochs. Did you mean --trainer.max_epochs?"),
    ("fit --num-epochs=3", "no option --num-epochs. Did you mean --trainer.max_epochs?"),
    ("fit --num_train_epochs 3", "Did you mean --trainer.max_epochs?"),
    ("fit --num_workers 3", "Did you mean --data.workers?"),
    ("fit --batch-size 8", "Did you mean --data.batch_size?"),
    ("fit --model.image-size 8", "Did you mean --data.image_size?"),
    ("fit --seed 8", "Did you mean --seed_everything?"),
    ("fit --xyz 8", "no option --xyz. See --help."),
    ("fit --model resnet18", "--model takes a YAML file, not resnet18; one setting is"),
    ("fit --trainer.max_epochs many", "--trainer.max_epochs is many; it takes int or null"),
    ("fit --model.loss torch.nn.CrossEntropyLoss --model.loss.label_smoothing 0.1", "--model.loss cannot be used: "),
    ("fit --model.loss focl", "--model.loss focl cannot be used: "),
    ("fit --model.metrics+=torchmetrics.CohenKapa", "metrics torchmetrics.CohenKapa cannot be used: "),
    ("fit --model.metrics [torchmetrics.CohenKapa]", "torchmetrics has no CohenKapa. Did you mean CohenKappa?"),
    ("fit --model.metrics+=torchmetrics.CohenKappa", "metrics torchmetrics.CohenKappa cannot be used: it needs task"),
    ("fit --model.metrics+=torch.nn.ReLU", "Expected 'torch.nn.ReLU' to be a subclass of Metric"),
    ("fit --model.optimizer lamp", "--model.optimizer lamp cannot be used: it takes adam or adamw or sgd, or package."),
    ("fit --model.optimizer NAdm", "or sgd, or package.module.Class. Did you mean NAdam?"),
    ("fit --model.scheduler plateu", "package.module.Class. Did you mean plateau?"),
    ("fit --model.optimizer torch.optim.NAdm", "torch.optim has no NAdm. Did you mean NAdam?"),
    ("fit --model.optimizer torch.nn.Linear", "it is no Optimizer, nor a function annotated -> Optimizer"),
    ("fit --model.optimizer NAdam --model.optimizer.lr 1", "--model.lr sets its lr."),
    ("fit --model.scheduler OneCycleLR --model.scheduler.max_lr 1", "--model.lr sets its lr."),
    (
        "fit --model.scheduler StepLR",
        "--model.scheduler torch.optim.lr_scheduler.StepLR cannot be used: it needs step_size",
    ),
    ("fit --patience x", "--patience is x; it takes PositiveInt or null"),
    ("fit --patience 0", "--patience is 0; it must be above 0"),
    ("fit --data.root photos --patience 3 --trainer.limit_val_batches 0", "--patience needs validations"),
    ("fit --average 1", "--average is 1; it must be above 0 and below 1"),
    ("fit --config none.yaml", "none.yaml"),
    ("fit --config bad.yaml", "bad.yaml: "),
    ("fit --config bad.yaml", "line 2"),
    ("fit --config bytes.csv", "bytes.csv: "),
    *((f"fit --config {name}", f"{name}: this is no YAML file") for name in ("nothing.csv", "file", "binary", "zip")),
    *((f"fit --{words} binary", "binary: this is no YAML file") for words in ("model", "data")),
    ("fit --config unknown.yaml", "no option --data.rooot. Did you mean --data.root?"),
    ("fit --data.root", "--data.root"),
    ("fit --data.root photos --model.name alexnot", "alexnet"),
    ("fit --data.root photos --model.positive 7", "one of two classes"),
    ("fit --model.weight_decay -1", "--model.weight_decay is -1; it must be at least 0"),
    ("fit --model.warmup 3", "--model.warmup is 3; it must be at least 0 and at most 1"),
    ("fit --data.root photos --trainer.max_epochs 0", "nothing to train"),
    (
        "fit --data.root photos --trainer.strategy nonsense",
        "does not accept these options: You selected an invalid strategy",
    ),
    ("fit --help --model.lrr", "There is no option --model.lrr. Did you mean --model.lr?"),
    ("fit --histograms", "--histograms needs a value, after it or after =; see --help."),
    ("predict runs/latest photos --tta true", "A flag is given without a value; leave true out."),
    ("predict runs/latest photos --tta=true", "--tta is given without a value; leave it out."),
    ("predict run nowhere", "no file or folder nowhere"),
    ("predict run empty", "no images in empty"),
    ("predict run nothing.csv", "has no column path; it has nothing"),
    ("predict run other.csv", "has no column path; it has file, label"),
    ("predict run hole.csv", "line 3, has no path"),
    ("predict run bytes.csv", "Cannot read"),
    ("predict run heads.csv", "no images in"),
    ("predict run", "A run and images are needed, in this order"),
    ("predict photos/red/000.png", "type a run first, as in: runs/latest photos/"),
    (
        "test photos",
        "is no run; put a run before it, such as runs/latest, or: python -m project.cli test runs/latest --d",
    ),
    ("predict photos/red/000.png photos", "photos/red/000.png can be images, but is no run"),
    ("explain nothing.csv photos", "nothing.csv can be images, but is no run"),
    ("predict run photos --batch_size 0", "--batch_size is 0; it must be above 0"),
    ("serve run --port x", "--port is x; it takes NonNegativeInt."),
    ("serve run --timeout x", "--timeout is x; it takes PositiveFloat."),
    ("predict run photos --min-confidence nan", "--min_confidence is nan; it"),
    ("predict run photos --min-confidense 1", "no option --min-confidense. Did you mean --min_confidence?"),
    ("predict run photos --calibrated", "No temperature is known for"),
    ("predict run photos --top 1 --out -", "--top prints on standard output"),
    ("predict run photos --out file/a.csv", "file is no folder"),
    ("predict run photos --out no/a.csv", "is no folder"),
    (f"predict run photos --out {LONG}", "File name too long"),
    (f"predict run photos --out {LONG[:240]}.csv", "cannot be written: File name too long"),
    ("predict run photos --out photos --overwrite", "photos exists"),
    ("predict run photos --out pipe --overwrite", "pipe exists"),  # stands for devices; never name a real one
    ("predict run photos --out file", "file exists; give another path by --out, or add --overwrite"),
    ("explain run photos --method magic", "--method is magic; it takes gradcam or ig or occlusion"),
    ("explain run photos --target gren", "not one of the classes blue, green, red. Did you mean green?"),
    ("explain none.ckpt photos", "no checkpoint none.ckpt"),
    ("explain file photos", "is not a checkpoint"),
    ("explain run nowhere", "no file or folder nowhere"),
    ("explain run bad/0.jpg", "None of the 1 images can be read"),
    ("explain run photos --out no/why", "no folder"),
    ("explain run photos --out file/why", "file is no folder"),
    ("explain run photos --out file", "file exists"),
    ("check nowhere", "no folder nowhere; give a folder of images"),
    ("check photos --layout splits", "no folder train; the layout splits needs"),
    (f"check {LONG}", "no folder xxx"),
    ("check empty", "No images in empty"),
    ("check photos --image_size 0", "--image_size is 0"),
    (f"check photos --json {LONG}", "File name too long"),
    ("check photos --json file", "file exists"),
    ("check photos --preview file", "file exists"),
    ("check photos --quarantine file", "file exists"),
    ("bench accuracy --target 0.9", "make bench ARGS=accuracy"),
    ("bench dat", "it takes training or data or saving"),
    ("bench data --rounds 0", "--rounds is 0; it must be above 0"),
    ("bench data --json photos", "photos exists"),
    ("bench --root bad", "images can be read; the first: "),
    ("bench --root bad/0.jpg", "bad/0.jpg has 1."),
    ("tune --resume run --trainer.max_epochs 9", "leave --resume out"),
    ("tune --data.root nowhere", "no folder nowhere"),
    ("tune --data.root photos --steps 3", "--steps is 3; it must be at least 24"),
    ("tune --data.root photos --model.name squeezenet1_1 --plot file", "file exists"),
]


def test_help_lists_every_verb(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in cli.VERBS)
    assert cli.main([]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistake_gets_one_sentence_and_changes_nothing(trained, workplace, refused, words, sentence):
    def files():  # but those of data/, with the digits and the cache
        return {path: path.lstat().st_mtime_ns for path in Path().rglob("*") if path.parts[0] != "data"}

    Path("run").symlink_to(trained / "runs" / "photos" / "version_0")
    Path("photos").symlink_to(trained / "photos")
    Path("empty").mkdir()
    os.mkfifo("pipe")
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    before = files()
    assert sentence in refused(*shlex.split(words))
    assert files() == before


@pytest.mark.parametrize("verb", cli.TRAINER_VERBS)
def test_help_has_one_line_for_each_own_option(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: python -m project.cli {verb} [{'DIR' if verb in ('fit', 'tune') else 'RUN'}] [options]"
    assert len(lines) < 120
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--seed_everything", "--ckpt_path", "--data.root", "--model.lr"} < set(names)
    assert not [name for name in names if name.startswith("--trainer")]
    assert names.index("--ckpt_path") < names.index("--data.root") < names.index("--model.name")
    assert ("--steps" in names) == ("--plot" in names) == (verb == "tune")
    assert "--help trainer" in lines[-1]


def test_help_explains_an_option_in_full_and_lists_the_trainers_on_request(capsys, tmp_path):
    def help_on(*words):
        assert cli.main(["fit", *words]) == 0
        return capsys.readouterr().out

    assert " ".join(help_on("--help", "--model.lr").split()).endswith("(type: PositiveFloat | null, default: null)")
    assert "To enable infinite training" in " ".join(help_on("--help", "--trainer.max_epochs").split())
    assert "--trainer.callbacks.patience" in help_on("--trainer.callbacks.help", "EarlyStopping")
    assert help_on("--help", str(tmp_path)).startswith("usage: ")
    for group in ("trainer", "--trainer"):
        lines = help_on("--help", group).splitlines()
        assert {"--trainer.max_epochs", "--trainer.devices"} < {line.split()[0] for line in lines}
        assert len(lines) < 60


def test_bugs_of_ours_keep_their_traceback_and_ctrl_c_does_not(monkeypatch, capsys):
    errors = [KeyboardInterrupt, BrokenPipeError("of a worker"), ValueError("ours")]

    def broken(argv):
        raise errors.pop()

    monkeypatch.setattr(cli, "_run", broken)
    for kind in (ValueError, BrokenPipeError):
        with pytest.raises(kind):
            cli.main(["fit"])
    assert cli.main(["fit"]) == 130


def test_help_mistakes_check_and_light_modules_import_nothing_heavy_and_a_name_that_is_no_text_is_printed(photos):
    Path(os.fsdecode(os.fsencode(photos / "red") + b"/caf\xe9.png")).write_bytes(b"no image")
    Path("a.ckpt").touch()
    codes = {
        "--help": 0,
        "--version": 0,
        "fti": 2,
        "--data.root x fit": 2,
        "predict --help": 0,
        "predict a.ckpt no.png": 2,
    }
    codes["check photos"] = 1
    code = f"""if True:
        import sys, project.cli, project.commands.explain, project.data.images, project.data.manifest, project.models
        heavy = {{"torch", "lightning", "matplotlib", "captum"}}
        print({{words: (project.cli.main(words.split()), heavy & set(sys.modules)) for words in {list(codes)}}})"""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str({words: (code, set()) for words, code in codes.items()})
    assert "There is no file or folder no.png" in done.stderr
    assert f"lightning-image-template {__version__}\n" in done.stdout
    assert "caf\\udce9.png: not an image" in done.stdout


def greet(path: Path, *, numbers: list[int], loud: bool = False, ask: bool = True, times: int | None = None) -> None:
    """Greets.

    Args:
        path: A file.
    """
    print(path.name, numbers, loud, ask, times)


def greet_all(first: str, *more: str, loud: bool = False) -> None:
    """Greets everyone."""
    print(first, more, *["loud"] * loud)


def test_a_plainly_typed_function_is_a_verb_and_its_flags_look_like_flags(capsys):
    for words, expected in (
        ("a/b 1 2", "b [1, 2] False True None"),
        ("b 1 --loud --no-ask --times 3", "b [1] True False 3"),
    ):
        assert arguments.call(greet, "greet", words.split()) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    for words, expected in (("a", "a ()"), ("a b c --loud", "a ('b', 'c') loud")):
        assert arguments.call(greet_all, "greet_all", words.split()) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(SystemExit):
        arguments.call(greet, "greet", ["--help"])
    assert "[--loud] [--ask | --no-ask] [--times TIMES] path numbers [numbers ...]" in " ".join(
        capsys.readouterr().out.split()
    )


def test_commands_in_sentences_are_quoted_for_a_shell():
    shown = "python -m project.cli fit --resume 'runs/my photos/version_0'"
    assert command("fit", "--resume", Path("runs/my photos/version_0")) == shown
    for file in Path(cli.__file__).parent.rglob("*.py"):
        for line in file.read_text().splitlines():
            assert not re.search(r"project\.cli \w+ .*\{", line), (file, line)


@pytest.mark.parametrize(
    ("words", "code", "mistakes"),
    [
        (["project", "--help"], 141, 0),
        (["project", "models", "alexnet"], 141, 0),
        (["project", "predict", "--help"], 0, 0),  # argparse itself ignores the closed pipe
        (["project.cli", "fti"], 2, 1),
    ],
)
def test_both_ways_to_start_it_give_exit_codes_and_a_closed_pipe_ends_them_quietly(words, code, mistakes):
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head` does after some lines
    assert len(process.communicate()[1].splitlines()) == mistakes
    assert process.returncode == code


def test_python_without_the_libraries_is_told_to_activate_its_environment():
    words = [sys.executable, "-S", "-m", "project.cli", "check", "photos"]  # -S: without site-packages
    done = subprocess.run(words, cwd=Path(cli.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+ does not have what .* activate its environment, source .*\n", done.stderr)
