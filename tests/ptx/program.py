"""PTX as text to instructions."""

import re
from dataclasses import dataclass, field

LABEL = re.compile(r"([\w$]+):(?!:)")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\((.*?)\)(.*?)\{", re.DOTALL)
PARAMETER = re.compile(r"\b\w+_param_\d+\b")
GUARD = re.compile(r"@(!?)(%?\w+)\s+")


@dataclass(frozen=True)
class Instruction:
    """guard: register that has to be true (false where `negated`), or "". parts: of the name, split at its dots.
    operands: as written; braces and brackets are kept."""

    parts: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False

    @property
    def name(self) -> str:
        return ".".join(self.parts)


@dataclass(eq=False)
class Program:
    """registers: name -> "pred", "b16", "b32" or "b64"; labels: name -> position of the next instruction."""

    name: str
    parameters: list[str]
    threads: int
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def kind_of(self, register: str) -> str:
        return self.registers.get(register) or self.registers[re.sub(r"\d+$", "", register)]


def parse(ptx: str) -> Program:
    """The one kernel of a module. Raises ValueError where there is none or several."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} kernels in one module of PTX; one was expected")
    (entry,) = entries
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
    if threads is None:
        raise ValueError(f"{entry[1]}: no number of threads")
    program = Program(entry[1], PARAMETER.findall(entry[2]), int(threads[1]))
    _body(text, entry.end(), program)
    return program


def _body(text: str, position: int, program: Program) -> None:
    """Statements until the brace that closes the kernel; names of inner blocks get the block's number."""
    scopes: list[dict[str, str]] = [{}]
    blocks = 0
    while scopes:
        position += len(text[position:]) - len(text[position:].lstrip())
        if text[position] == "{":
            blocks += 1
            scopes.append({name: f"{name}_in_block_{blocks}" for name in _declared(text, position)})
            position += 1
        elif text[position] == "}":
            scopes.pop()
            position += 1
        elif label := LABEL.match(text, position):
            program.labels[_renamed(label[1], scopes)] = len(program.instructions)
            position = label.end()
        else:
            end = text.index(";", position)
            _statement(_renamed(text[position:end].strip(), scopes), program)
            position = end + 1


def _declared(text: str, start: int) -> list[str]:
    """Registers and labels of the block whose brace stands at `start`."""
    depth, end = 0, start
    while depth or end == start:
        depth += (text[end] == "{") - (text[end] == "}")
        end += 1
    block = text[start:end]
    names = re.findall(r"\.reg\s+\.\w+\s+([\w%]+)\s*;", block)
    return names + re.findall(r"^\s*([A-Za-z]\w*):(?!:)", block, re.MULTILINE)


def _renamed(text: str, scopes: list[dict[str, str]]) -> str:
    for scope in scopes:
        for name, new in scope.items():
            text = re.sub(rf"(?<![\w%.$]){re.escape(name)}(?![\w.])", new, text)
    return text


def _statement(text: str, program: Program) -> None:
    if declared := REGISTERS.match(text):
        for name in declared[2].split(","):
            program.registers[re.sub(r"<\d+>", "", name).strip()] = declared[1]
        return
    if not text or text.startswith("."):
        return
    guard = GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    name, _, operands = rest.replace("\t", " ").strip().partition(" ")
    program.instructions.append(
        Instruction(
            tuple(name.replace("::", "__").split(".")),
            tuple(split(operands)),
            guard[2] if guard else "",
            bool(guard and guard[1]),
        )
    )


def split(operands: str) -> list[str]:
    """At the commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(operands):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(operands[start:i].strip())
            start = i + 1
    last = operands[start:].strip()
    return [*found, last] if last else found
