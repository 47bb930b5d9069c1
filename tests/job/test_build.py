"""What a job is built from."""

from latent_delib.job import build


def test_a_start_names_a_workdir_and_a_step():
    assert build.split_start("gs://b/run/checkpoints/12/") == ("gs://b/run", 12)
