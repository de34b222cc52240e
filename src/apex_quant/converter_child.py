"""What the converter's own Python runs: llama.cpp's script, with four things added. Never imported by us.

    python converter_child.py '{"script": FILE, "parent": PID, "pre": NAME|null, "without_nextn": false,
                                "trust": false}' SCRIPT'S ARGUMENTS

It ends with its parent. Python code from the checkpoint is not run unless it is trusted. A vocabulary whose splitting
rule the script does not recognize gets the named rule instead of an error. NextN blocks are left out, as with
--no-nextn, of the architectures of which the script can: it refuses the option for all others and for projectors. A
checkpoint that is known to hold none is converted so too, as the Qwen classes would fail an assertion.
"""

import json
import os
import runpy
import signal
import sys


def _end_with(parent: int) -> None:
    """Linux sends SIGTERM when the parent is killed; a converter left alone would fill the disk for nobody."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


def _refuse_remote_code() -> None:
    """Some model classes ask transformers to trust the checkpoint's code: what would import it raises instead."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        return  # then the script says that it is missing

    def refused(*_names: object, **_options: object) -> None:
        raise RuntimeError("APEX: the checkpoint wants to run Python code of its own")

    # before anything else imports these names
    for name in ("get_class_from_dynamic_module", "get_cached_module_file", "get_class_in_module"):
        setattr(dynamic_module_utils, name, refused)


def _name_rule(rule: str) -> None:
    """Answer `rule` where the script raises for an unknown splitting rule."""
    from conversion.base import TextModel  # type: ignore[import-not-found]

    recognized = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: object, tokenizer: object) -> object:
        try:
            return recognized(self, tokenizer)
        except NotImplementedError:
            print("APEX: the splitting rule is not recognized, taking " + rule, file=sys.stderr, flush=True)
            return rule

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def _expect_no_nextn() -> None:
    """--no-nextn for the architectures that have it; the script refuses it for all others."""
    import conversion  # type: ignore[import-not-found]

    found = conversion.get_model_class

    def get_model_class(*names: object, **options: object) -> object:
        cls = found(*names, **options)
        if getattr(cls, "supports_mtp_export", False):
            cls.no_mtp = True
        return cls

    conversion.get_model_class = get_model_class


def main() -> None:
    options = json.loads(sys.argv[1])
    _end_with(options["parent"])
    script = options["script"]
    sys.argv = [script, *sys.argv[2:]]
    sys.path[0] = os.path.dirname(script)  # noqa: PTH120 -- as if the script had been run, not this file
    if not options["trust"]:
        _refuse_remote_code()
    if options["pre"]:
        _name_rule(options["pre"])
    if options["without_nextn"] and os.path.isdir(os.path.join(sys.path[0], "conversion")):  # noqa: PTH112, PTH118
        _expect_no_nextn()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
