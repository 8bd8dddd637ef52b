"""The keys of Lightning's loop state that resuming depends on, compared with a checkpoint of plain Lightning."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from project.training import loop_state
from project.training.loop_state import COUNTERS, LoopState


def test_a_checkpoint_of_plain_lightning_has_the_keys_that_are_set(tmp_path):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    loops = checkpoint["loops"]["fit_loop"]
    for part in (loop_state.EPOCHS, loop_state.BATCHES, loop_state.VALIDATION):
        assert set(loops[part]["total"]) == set(COUNTERS)
        assert loop_state.IS_LAST_BATCH in loops[part] or part == loop_state.EPOCHS
    assert {"step", "zero_grad"} == set(loops[loop_state.OPTIMIZER]["optimizer"])
    part, key = loop_state.LOGGED_STEPS
    assert loops[part][key] == 3
    assert loop_state.epochs_done(checkpoint) == 1
    assert LoopState.saved_in(checkpoint) is None
    LoopState(epoch=1, batches=3, total=3, step=3).put_into(checkpoint)
    assert loops[loop_state.BATCHES]["total"] == dict.fromkeys(COUNTERS, 3)
    assert loops[loop_state.BATCHES]["current"] == dict.fromkeys(COUNTERS, 0)
