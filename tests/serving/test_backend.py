"""Choosing a server, its options and the plan, with a stand-in for llama-server."""

from __future__ import annotations

import itertools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.errors import InputError, ResourceError, UsageError
from apex_quant.evaluation.kv_types import server_types
from apex_quant.serving import backend
from apex_quant.serving.access import is_loopback, read_keys
from apex_quant.serving.backend import Found, Launch, command, devices, flags
from apex_quant.serving.serve import plan_service, serve
from tests.helpers.random_models import write_random_gguf
from tests.serving.standin import HELP, seen, standin

MODEL = embedded_model()


def key_file(path: Path, text: str = "# mine\nsecret-1\nsecret-2\n", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def _no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute buffers by the formula: the library is asked elsewhere."""

    def refuse(*words: object, **more: object) -> None:
        raise ResourceError("not here")

    monkeypatch.setattr("apex_quant.serving.fit.library_memory", refuse)


def test_a_service_of_llama_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = standin(tmp_path / "bin", free=20000)
    keys = key_file(tmp_path / "keys")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "99")
    with serve(MODEL, server=program, port=0, api_key_file=keys, parallel=2, kv="q8_0/q5_1", ctx=1000) as service:
        told = seen(tmp_path / "bin")
        assert service.healthy
        assert service.url.startswith("http://127.0.0.1:")
    words = told["argv"]
    given = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
    assert given["--model"] == str(MODEL.absolute())
    assert (given["--ctx-size"], given["--parallel"]) == ("2000", "2")
    assert (given["--cache-type-k"], given["--cache-type-v"], given["--flash-attn"]) == ("q8_0", "q5_1", "on")
    assert (given["--n-gpu-layers"], given["--fit"]) == ("13", "off")
    assert "--jinja" in words
    assert "--n-cpu-moe" not in words
    assert not any("secret" in word for word in words)  # everybody can read command lines
    assert told["env"]["LLAMA_API_KEY"] == "secret-1,secret-2"
    assert "LLAMA_ARG_CTX_SIZE" not in told["env"]
    assert service.program.status is not None


def test_a_server_that_does_not_come_up(tmp_path: Path) -> None:
    program = standin(tmp_path)
    (tmp_path / "fails").touch()
    with pytest.raises(ResourceError, match=r"status 3 before it served .*out of memory"):
        serve(MODEL, server=program, port=0)


def test_addresses_need_keys(tmp_path: Path) -> None:
    program = standin(tmp_path)
    for host in ("0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(UsageError, match="there is no key"):
            serve(MODEL, server=program, host=host)
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("10.0.0.1")
    assert not (tmp_path / "seen.json").exists()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    program = standin(tmp_path)
    with serve(MODEL, server=program, port=0) as service, pytest.raises(ResourceError, match="cannot be used"):
        serve(MODEL, server=program, port=service.port)
    with pytest.raises(UsageError, match="outside"):
        serve(MODEL, server=program, port=70000)


def test_somebody_else_at_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes the port after it was looked at is not reported as ours, whatever it answers, and gets no key."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Handler) as foreign:
        threading.Thread(target=foreign.serve_forever, daemon=True).start()
        monkeypatch.setattr("apex_quant.serving.serve.bindable", lambda host, port: port)
        program, keys = standin(tmp_path / "bin"), key_file(tmp_path / "keys")
        with pytest.raises(ResourceError, match="Address already in use"):
            serve(MODEL, server=program, port=foreign.server_port, api_key_file=keys)
        (tmp_path / "bin" / "never").touch()  # it does not even try, as long as it loads
        looks = itertools.count()
        with pytest.raises(ResourceError, match="did not serve"):
            serve(MODEL, server=program, port=foreign.server_port, deadline=3, clock=lambda: float(next(looks)))
        foreign.shutdown()
    assert asked == []


def test_an_address_as_urls_have_it(tmp_path: Path) -> None:
    with serve(MODEL, server=standin(tmp_path), port=0, host="[127.0.0.1]") as service:
        assert service.url == f"http://127.0.0.1:{service.port}/v1"
        assert option(seen(tmp_path)["argv"], "--host") == "127.0.0.1"


def option(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_keys(tmp_path: Path) -> None:
    assert read_keys(key_file(tmp_path / "a")) == ("secret-1", "secret-2")
    for text, mode, message in (
        ("x\n", 0o644, "others can read it"), ("", 0o600, "holds no key"), ("# only\n", 0o600, "holds no key"),
        ("a,b\n", 0o600, "comma"), ("a b\n", 0o600, "space"), ("é\n", 0o600, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message) as caught:
            read_keys(key_file(tmp_path / "b", text, mode))
        assert "a,b" not in caught.value.message
    with pytest.raises(InputError):
        read_keys(tmp_path)


def test_what_a_build_says() -> None:
    assert {"--model", "-ngl", "--n-gpu-layers", "--no-jinja"} <= flags(HELP)
    assert server_types(HELP.replace("{more}", ", turbo3"))[-1] == "turbo3"
    assert server_types("nothing") == ()


def test_devices(tmp_path: Path) -> None:
    found = Found("llama-server", (str(standin(tmp_path, free=100)),))
    (one,) = devices(found)
    assert (one.name, one.free, one.total) == ("CUDA0", 100 << 20, 24210 << 20)
    assert devices(Found("llama-server", (str(standin(tmp_path)),))) == ()
    with pytest.raises(ResourceError, match="does not run"):
        devices(Found("llama-server", ("/nonexistent/llama-server",)))


def test_a_card_is_counted_once(tmp_path: Path) -> None:
    """What another backend sees of it is not added, nor an integrated GPU's main memory; and the server is told."""
    more = (
        "  BLAS: OpenBLAS (0 MiB, 0 MiB free)\n  Vulkan0: NVIDIA Thing (24210 MiB, 23000 MiB free)\n"
        "  Vulkan1: Graphics (64000 MiB, 60000 MiB free)\n"
    )
    program = standin(tmp_path / "bin", free=23000, devices=more)
    assert [one.name for one in devices(Found("llama-server", (str(program),)))] == ["CUDA0", "Vulkan0", "Vulkan1"]
    with serve(MODEL, server=program, port=0, ctx=1000) as service:
        words = seen(tmp_path / "bin")["argv"]
    assert words[words.index("--device") + 1] == "CUDA0"
    assert service.plan.devices == ("CUDA0",)
    assert any("not planned for" in line and "Vulkan1 (Graphics)" in line for line in service.plan.reasons)
    tight = standin(tmp_path / "tight", free=1030, devices=more)  # 1 GiB stays free: the rest does not hold the model
    assert plan_service(MODEL, server=tight, ctx=2000).gpu_layers < 13
    alone = plan_service(MODEL, server=program, ctx=1000, vram=0)
    words, _ = command(Found("llama-server", ("x",)), Launch(MODEL, "h", 1, "m", 512, 1, "f16", "f16", 0,
                                                             devices=alone.devices))  # fmt: skip
    assert "--device" not in words


def test_cards_of_one_backend_are_used_together(tmp_path: Path) -> None:
    """Each keeps 1 GiB free and has compute buffers of its own."""
    second = "  CUDA1: NVIDIA Thing (24210 MiB, 1030 MiB free)\n"
    both = plan_service(MODEL, server=standin(tmp_path / "two", free=1030, devices=second), ctx=2000)
    assert both.devices == ("CUDA0", "CUDA1")
    assert both.gpu_layers < 13
    assert plan_service(MODEL, server=standin(tmp_path / "one", free=2060), ctx=2000).gpu_layers == 13
    words, _ = command(Found("llama-server", ("x",)), Launch(MODEL, "h", 1, "m", 512, 1, "f16", "f16", 13,
                                                             devices=both.devices))  # fmt: skip
    assert words[words.index("--device") + 1] == "CUDA0,CUDA1"
    words, lacking = command(Found("llama-server", ("x",)), Launch(MODEL, "h", 1, "m", 512, 1, "f16", "f16", 13,
                                                                   devices=both.devices),
                             flags(HELP) - {"--device"})  # fmt: skip
    assert lacking == ["--device"]


def test_options_that_a_build_lacks(tmp_path: Path) -> None:
    launch = Launch(MODEL, "127.0.0.1", 1, "m", 512, 1, "f16", "f16", 0, sampling={"temp": 0.5, "top-k": 20})
    known = flags(HELP)
    words, lacking = command(Found("llama-server", ("x",)), launch, known)
    assert "--top-k" not in words
    assert lacking == ["--top-k"]
    assert words[words.index("--temp") + 1] == "0.5"
    with pytest.raises(ResourceError, match="--n-cpu-moe"):
        command(
            Found("llama-server", ("x",)),
            Launch(MODEL, "127.0.0.1", 1, "m", 512, 1, "f16", "f16", 3, cpu_moe=2),
            known - {"--n-cpu-moe"},
        )
    words, lacking = command(Found("llama_cpp.server", ("x",)), Launch(MODEL, "h", 1, "m", 512, 2, "q8_0", "f16", 0))
    assert words[words.index("--type-k") + 1] == "q8_0"
    assert lacking
    with pytest.raises(ResourceError, match="turbo3"):
        command(Found("llama_cpp.server", ("x",)), Launch(MODEL, "h", 1, "m", 512, 1, "turbo3", "f16", 0))


def test_types_that_only_a_fork_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"turbo3 is not in stock llama\.cpp.*q5_1/q5_0 takes 5\.75 bits"):
        plan_service(MODEL, server=standin(tmp_path), kv="q8_0/turbo3")
    fork = standin(tmp_path / "fork", more=", turbo2, turbo3, turbo4", free=20000)
    with serve(MODEL, server=fork, port=0, kv="q8_0/turbo3", ctx=1000):
        words = seen(tmp_path / "fork")["argv"]
    assert words[words.index("--cache-type-v") + 1] == "turbo3"
    assert words[words.index("--flash-attn") + 1] == "on"
    stock, turbo = (plan_service(MODEL, server=fork, kv=kv, ctx=1024) for kv in ("q8_0", "q8_0/turbo3"))
    taken = [float(next(line for line in plan.reasons if "KV cache" in line).split(": ")[1].split()[0])
             for plan in (stock, turbo)]  # fmt: skip
    assert taken[1] < taken[0]
    with pytest.raises(UsageError, match="has no cache type f32"):
        plan_service(MODEL, server=standin(tmp_path / "old", help_text=HELP.replace("f32, ", "")), kv="f32")
    with pytest.raises(UsageError, match="no cache type is called"):
        plan_service(MODEL, server=fork, kv="q9_0")


def test_tiers_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_random_gguf(folder / "a.gguf", "llama", layers="D", sparse=True, metadata={"apex.tier": "i-quality"})
    write_random_gguf(folder / "m-Mini.gguf", "llama", layers="D", sparse=True)
    write_random_gguf(folder / "other.gguf", "llama", layers="D", sparse=True)
    server = standin(tmp_path / "bin")
    assert plan_service("i-quality", folder=folder, server=server).model.name == "a.gguf"
    assert plan_service("I-Quality", folder=folder, server=server).model.name == "a.gguf"
    monkeypatch.chdir(folder)
    assert plan_service("mini", server=server).model.name == "m-Mini.gguf"
    with pytest.raises(InputError, match="no file of tier balanced") as caught:
        plan_service("balanced", server=server)
    assert caught.value.hint == "there is i-quality (a.gguf), mini (m-Mini.gguf)"
    with pytest.raises(InputError):
        plan_service("no-such-tier", server=server)


def test_what_llama_server_keeps_beside_the_model_is_planned(tmp_path: Path) -> None:
    server = standin(tmp_path)
    plan = plan_service(MODEL, server=server, ram=1 << 30)
    assert 0 < plan.prompt_cache < 1 << 30
    assert 0 < plan.checkpoints <= 8  # the model has states
    assert any("earlier prompts" in line for line in plan.reasons)
    with serve(MODEL, server=server, port=0, plan=plan):
        words = seen(tmp_path)["argv"]
    assert words[words.index("--cache-ram") + 1] == str(plan.prompt_cache >> 20)
    assert words[words.index("--ctx-checkpoints") + 1] == str(plan.checkpoints)
    assert words[words.index("--cors-origins") + 1] == "localhost"
    with serve(MODEL, server=server, port=0, plan=plan, api_key_file=key_file(tmp_path / "keys")):
        assert "--cors-origins" not in seen(tmp_path)["argv"]


def test_the_plan_is_told_before_the_server_starts(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "fails").touch()
    with pytest.raises(ResourceError):
        serve(MODEL, server=standin(tmp_path), port=0, planned=lambda plan: told.append(plan.alias))
    assert told == ["apex-tiny-moe"]


def test_the_plan_uses_the_device_there_is(tmp_path: Path) -> None:
    """Everything on it, then the smaller cache, then less context, then experts in main memory."""
    folder = tmp_path / "tiers"
    folder.mkdir()
    for kind in ("BF16", "Q8_0"):
        write_random_gguf(folder / f"m-{kind}.gguf", "qwen3moe", dtype=kind, sparse=True)
    plenty = plan_service(folder, server=standin(tmp_path, free=20000))
    assert (plenty.model.name, plenty.ctx, plenty.gpu_layers, plenty.cpu_moe) == ("m-BF16.gguf", 512, 7, 0)
    assert (plenty.type_k, plenty.type_v) == ("f16", "f16")
    assert any("NVIDIA Thing" in reason for reason in plenty.reasons)
    none = plan_service(folder, server=standin(tmp_path))
    assert (none.model.name, none.gpu_layers) == ("m-BF16.gguf", 0)
    assert "no GPU that this server can use" in none.reasons
    small = plan_service(folder, server=standin(tmp_path), vram=(1 << 30) + (6 << 20))
    assert small.gpu_layers == 7
    assert small.cpu_moe > 0
    with pytest.raises(ResourceError, match="nothing fits"):
        plan_service(folder, server=standin(tmp_path), ram=1 << 20)
    with pytest.raises(UsageError, match="many"):
        plan_service(folder, server=standin(tmp_path), ctx="many")


def test_sampling_defaults_of_the_model(tmp_path: Path) -> None:
    path = write_random_gguf(
        tmp_path / "m.gguf", "llama", layers="D", sparse=True,
        metadata={"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.min_p": True},
    )  # fmt: skip
    plan = plan_service(path, server=standin(tmp_path))
    assert plan.sampling == {"temp": 0.5, "top-k": 20.0}
    assert any("sampling" in reason for reason in plan.reasons)


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(ResourceError, match="no llama-server there"):
        plan_service(MODEL)
    assert backend.KEY_VARIABLE == "LLAMA_API_KEY"
