"""YAML as configs need it: small, flat, every key once, no aliases. What is wrong is a ValueError of one line."""
import yaml

LONGEST = 300_000                   # bytes; more is refused unread


def load(path: str) -> object:
    """What the file holds, as yaml.safe_load would say; ValueError that says what is wrong with it."""
    try:
        with open(path, "rb") as file:
            raw = file.read(LONGEST + 1)
        if len(raw) > LONGEST:
            raise ValueError(f"over {LONGEST} bytes, so hardly a config file; give one like configs/demo.yaml")
        loader = yaml.SafeLoader(raw.decode("utf-8"))
        root = loader.get_single_node()
        refuse_twice(root, set())
        return None if root is None else loader.construct_document(root)
    except OSError as error:
        raise ValueError(f"cannot read the config file: {error.strerror}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply for a config file; write run, seed and flat sections") from error
    except (UnicodeError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:  # the last three: odd tags
        raise ValueError(f"not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from error


def refuse_twice(node: yaml.Node | None, seen: set[int]) -> None:
    """
    Refuse a key that is given twice in one mapping (yaml.safe_load would keep the last in silence), and an alias,
    whose node comes twice: a config needs none, and a few lines of them can stand for gigabytes or for themselves.
    """
    if id(node) in seen:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias (*name) stands for this; write the value out")
    seen.add(id(node))
    keys = set()
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = key.value if isinstance(key, yaml.ScalarNode) else id(key)
        if name in keys:
            raise ValueError(f"line {key.start_mark.line + 1}: '{name}' is given twice")
        keys.add(name)
        refuse_twice(key, seen)
        refuse_twice(value, seen)
    for item in node.value if isinstance(node, yaml.SequenceNode) else []:
        refuse_twice(item, seen)
