"""If a run's folder is renamed, one rank reports it in one sentence and the run ends."""

from distattn.checkpoints.folder_handle import FolderHandle
from distattn.ir.errors import DistattnError
from distattn.launch.ranks import supervised
from distattn.supervision.culprits import Culprit
from distattn.supervision.rank_watch import Trouble


def test_the_launcher_adds_nothing_to_what_ranks_say_of_a_renamed_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    refused = Trouble((Culprit(1, "refused with exit code 2: run: was renamed"),), "refused", 5, 0.0, 2)

    def rename(*_):
        folder.rename(tmp_path / "moved")
        return DistattnError.exit_code, refused

    monkeypatch.setattr(supervised, "_run_once", rename)
    with FolderHandle(folder) as held:
        code = supervised._run_until_done(None, None, supervised.Restarts(3, lambda: 0, held))
    assert code == DistattnError.exit_code and not capsys.readouterr().err
