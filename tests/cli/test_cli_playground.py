"""`qadapter playground`: folders in, a page out, or a refusal in one line."""

import json
import shutil
import signal
import socket
import urllib.request

import pytest
from commands import assert_refused, qadapter, start


def said_of_policy(*arguments):
    """(what the page is told of the policy, exit code after Ctrl-C, standard error) of `qadapter playground`."""
    with start("playground", *arguments, "--port", 0) as running:
        try:
            line = running.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), running.stderr.read()
            url = line.split()[4]
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{url}/api/policy", timeout=20) as response:
                policy = json.load(response)
            running.send_signal(signal.SIGINT)
            _, err = running.communicate(timeout=30)
        finally:
            running.kill()
    return policy, running.returncode, err


@pytest.mark.slow
def test_one_adapter_at_the_strength_asked_for(adapter, base):
    policy, code, err = said_of_policy(adapter, "--strength", 0.4)
    assert policy["base"] == str(base)
    assert (policy["title"], policy["strength"], list(policy["adapters"])) == ("adapter", 0.4, ["default"])
    assert (code, err) == (130, "error: interrupted.\n")


@pytest.mark.slow
def test_several_folders_have_a_slider_each_and_no_verify_is_heard(adapter, other_base, tmp_path):
    """A folder's name may hold what an adapter's may not."""
    names = ("adapter", "terse-v1.2", "terse-v1-2", "my_lora_1")
    others = [shutil.copytree(adapter, tmp_path / name) for name in names[1:]]
    policy, code, err = said_of_policy(adapter, *others, "--base-model", other_base, "--no-verify")
    assert tuple(policy["labels"].values()) == names
    assert policy["adapters"] == dict.fromkeys(policy["labels"], 1.0)
    assert policy["base"] == str(other_base)
    assert "warning: " in err
    assert "the base model differs" in err
    assert "Traceback" not in err
    assert code == 130


def test_folders_of_one_name_are_refused(adapter, tmp_path):
    second = shutil.copytree(adapter, tmp_path / "adapter")
    assert_refused(qadapter("playground", adapter, second, "--port", 0), r"several adapters are called \['adapter'\]")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--port", 70_000), "port = 70000: must lie in 0 ... 65535"),
        (("--strength", "nan"), "strength = nan: must be a finite number"),
        (("--strength", 11), "strength = 11: the page's dial goes from -10 to 10"),
    ],
)
def test_impossible_options_are_refused(adapter, options, match):
    assert_refused(qadapter("playground", adapter, *options), match)


def test_a_port_in_use_is_refused_before_anything_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        outcome = qadapter("playground", tmp_path / "no-adapter", "--port", port)
    assert_refused(outcome, f"cannot listen on 127.0.0.1 port {port}")
