"""Two ``vlae shard`` of one name with other options at once: one data set, and it is whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipeline.data import DataSet
from pipeline.data.inspection import verify_shard
from pipeline.storage import open_storage
from tests.pipeline.images import write_idx

pytestmark = pytest.mark.usefixtures("ray_cluster")

CODE = (
    "import sys; from pipeline.commands.images.shard import ShardConfig, run\n"
    "from pipeline.config.sections import *\n"
    "from pipeline.errors import UserError\n"
    "url, path, address, block = sys.argv[1:]\n"
    "dataset = DatasetOptions(name='one', source=Source.idx, path=path, url=url)\n"
    "options = ShardOptions(samples_per_shard=100, block_size=int(block))\n"
    "storage, cluster = StorageOptions(root=url), ClusterOptions(address=address)\n"
    "try: print('written', run(ShardConfig(storage, dataset, options, cluster))['reused'])\n"
    "except UserError as error: print('refused', error)\n"
)


def test_one_of_two_shardings_wins_and_its_data_is_whole(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", num_train=6000, num_test=600)
    url, address = str(tmp_path / "storage"), ray.get_runtime_context().gcs_address
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, url, str(tmp_path / "idx"), address, block],
            stdout=subprocess.PIPE,
            text=True,
        )
        for block in ("10", "25")
    ]
    told = [process.communicate(timeout=250)[0] for process in running]
    assert sorted(text.split()[0] for text in told) == ["refused", "written"], told
    data = DataSet.load(open_storage(url))
    shards = data.manifest.splits
    for split in shards:
        for number in range(len(shards[split])):
            assert verify_shard(data, split, number)[2] is None
    named = {name for each in shards.values() for s in each for name in (s.name, s.index_name)}
    assert set(open_storage(url).list()) == named | {"manifest.json", "report.json"}
