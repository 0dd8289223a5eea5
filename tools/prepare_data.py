"""Tokenizes text ahead of training, into a store that every rank and every later run maps.

    python tools/prepare_data.py --model MODEL_DIR --output runs/tokens text/ more.jsonl

Give .txt, .md and .py files (one document each), .jsonl files (one document a line, under
--text-key) and folders of them. Training tokenizes by itself when it is given text; do it here
first when the text is large or many runs share it. An output folder that already holds this very
store is kept as it is; one that holds anything else is refused.
"""

import argparse
import sys
import time
from pathlib import Path

from megalard.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="text files or folders")
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="the model's Hugging Face folder; its tokenizer.json or tokenizer.model is used",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="the token store to write"
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl (default: text)",
    )
    args = parser.parse_args()
    try:
        # Imported late: --help should not wait for torch and transformers.
        from megalard.data.token_file import build_store
        from megalard.data.tokenizer import load_tokenizer

        began = time.perf_counter()
        tokenizer = load_tokenizer(args.model)
        store = build_store(args.paths, tokenizer, args.output, text_key=args.text_key)
    except UserError as error:
        print(f"megalard: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megalard: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(
        f"{store.path}: {len(store.tokens)} tokens in {len(store.documents) - 1} documents, "
        f"{store.tokens.dtype}, ready after {time.perf_counter() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
