#!/usr/bin/env python3
"""Writes tokenizer/unicode_tables.cc, the character classes that pre-tokenizers ask about.

    python3 tools/make_unicode_tables.py > tokenizer/unicode_tables.cc

Letters are the general categories L*, numbers N*. White space is the Unicode property White_Space,
which unicodedata does not have; it is the categories Z* and the controls U+0009-000D and U+0085
(str.isspace() differs: it also takes U+001C-001F).
"""

import sys
import unicodedata

UNICODE_VERSION = "14.0.0"  # what Python 3.11 carries

RANGES_A_LINE = 4


def is_letter(code_point):
    return unicodedata.category(chr(code_point))[0] == "L"


def is_number(code_point):
    return unicodedata.category(chr(code_point))[0] == "N"


def is_space(code_point):
    return (unicodedata.category(chr(code_point))[0] == "Z" or 0x09 <= code_point <= 0x0D
            or code_point == 0x85)


def ranges(predicate):
    found = []
    for code_point in range(0x110000):
        if not predicate(code_point):
            continue
        if found and found[-1][1] == code_point - 1:
            found[-1][1] = code_point
        else:
            found.append([code_point, code_point])
    return found


def main():
    if unicodedata.unidata_version != UNICODE_VERSION:
        sys.exit(f"make_unicode_tables.py: expected Unicode {UNICODE_VERSION}, found "
                 f"{unicodedata.unidata_version}; run it with Python 3.11, or change "
                 "UNICODE_VERSION to move the tables to another version")
    print(f"// Made by tools/make_unicode_tables.py from Unicode {UNICODE_VERSION}: do not edit.")
    print('#include "tokenizer/unicode.h"\n')
    print("// clang-format off\nnamespace chimera {")
    for name, predicate in (("Letter", is_letter), ("Number", is_number), ("Space", is_space)):
        table = [f"{{0x{first:04X}, 0x{last:04X}}}," for first, last in ranges(predicate)]
        print(f"\nstatic constexpr CodePointRange k{name}s[] = {{")
        for i in range(0, len(table), RANGES_A_LINE):
            print("    " + " ".join(table[i:i + RANGES_A_LINE]))
        print("};")
        print(f"const std::span<const CodePointRange> k{name}Ranges = k{name}s;")
    print("\n}  // namespace chimera")


main()
