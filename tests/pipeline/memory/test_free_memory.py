import pytest

from asyncshard.pipeline.memory.free_memory import DEFAULT_BUDGET_MB, default_budget_mb, free_bytes

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def root(tmp_path):
    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def meminfo(nbytes):
    return {"proc/meminfo": f"MemTotal:       99999999 kB\nMemFree:  1 kB\nMemAvailable:   {nbytes // 1024} kB\n"}


def group(folder, limit, used, inactive=0):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7\n",
    }


def test_without_a_limit_the_free_memory_of_the_machine_counts(root):
    place = root({**meminfo(3 * GIB), "proc/self/cgroup": "0::/\n"})
    assert free_bytes(place) == 3 * GIB
    assert default_budget_mb(place) == 768


def test_the_default_is_at_most_2048_mb_and_at_least_one(root):
    assert default_budget_mb(root(meminfo(500 * GIB))) == DEFAULT_BUDGET_MB == 2048
    assert default_budget_mb(root(meminfo(100_000 * 1024 // 1024))) == 1


def test_a_system_that_tells_nothing_gets_the_default_budget(tmp_path):
    assert free_bytes(tmp_path) is None
    assert default_budget_mb(tmp_path) == DEFAULT_BUDGET_MB


def test_the_tightest_group_above_the_process_counts(root):
    place = root(
        {
            **meminfo(64 * GIB),
            "proc/self/cgroup": "0::/slice/pod/container\n",
            **group("sys/fs/cgroup/slice", "max", 5),
            **group("sys/fs/cgroup/slice/pod", 8 * GIB, 6 * GIB),
            **group("sys/fs/cgroup/slice/pod/container", 4 * GIB, GIB),
        }
    )
    assert free_bytes(place) == 2 * GIB


def test_page_cache_that_the_kernel_would_drop_is_free(root):
    place = root(
        {**meminfo(64 * GIB), "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", 2 * GIB, 2 * GIB, inactive=GIB)}
    )
    assert free_bytes(place) == GIB


def test_in_a_container_the_mount_is_the_group_itself(root):
    place = root(
        {
            **meminfo(64 * GIB),
            "proc/self/cgroup": "0::/kubepods/pod1234/abcd\n",  # as the host sees it: not below this mount
            **group("sys/fs/cgroup", GIB, 0),
        }
    )
    assert free_bytes(place) == GIB


def test_control_groups_of_version_1_count(root):
    place = root(
        {
            **meminfo(64 * GIB),
            "proc/self/cgroup": "12:cpu,cpuacct:/docker/abcd\n4:memory:/docker/abcd\n1:name=systemd:/docker/abcd\n",
            "sys/fs/cgroup/memory/docker/abcd/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/docker/abcd/memory.usage_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/docker/abcd/memory.stat": f"total_inactive_file {GIB // 2}\ninactive_file 3\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{4 * GIB}\n",
        }
    )
    assert free_bytes(place) == GIB + GIB // 2


def test_a_group_over_its_limit_leaves_nothing(root):
    place = root({**meminfo(GIB), "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", GIB, 2 * GIB)})
    assert free_bytes(place) == 0
    assert default_budget_mb(place) == 1


@pytest.mark.parametrize("text", ["", "garbage\n", "0::\n", "0::/a:b\n", "MemAvailable:\n"])
def test_files_that_make_no_sense_are_passed_over(root, text):
    place = root({"proc/self/cgroup": text, "proc/meminfo": text, "sys/fs/cgroup/memory.max": text})
    assert free_bytes(place) is None


def test_this_machine_tells_its_free_memory():
    assert 1 <= default_budget_mb() <= DEFAULT_BUDGET_MB
