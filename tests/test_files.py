import os
from pathlib import Path

import pytest

from project import files


def test_file_is_replaced_whole_or_not_at_all_with_the_usual_permissions(workplace):
    target, usual = Path("a.csv"), Path("usual")
    usual.touch()
    with files.replacing(target) as stream:
        stream.write("first")
    with pytest.raises(TypeError), files.replacing(target) as stream:
        stream.writelines(["second, and then", 0])
    assert target.read_text() == "first"
    assert target.stat().st_mode == usual.stat().st_mode
    assert sorted(os.listdir()) == ["a.csv", "usual"]
