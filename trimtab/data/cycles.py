"""Circles in preferences: A over B, B over C, and C over A."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def finishing_order(graph: Mapping[Node, Collection[Node]]) -> list[Node]:
    """All nodes in the order in which a depth-first search leaves them; written without recursion, graphs are deep."""
    order: list[Node] = []
    seen: set[Node] = set()
    for root in graph:
        stack = [] if root in seen else [(root, iter(graph[root]))]
        seen.add(root)
        while stack:
            node, targets = stack[-1]
            target = next((target for target in targets if target not in seen), None)
            if target is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(target)
                stack.append((target, iter(graph.get(target, ()))))
    return order


def reachable(graph: Mapping[Node, Collection[Node]], start: Node, allowed: set[Node]) -> set[Node]:
    """The allowed nodes that can be reached from one of them, itself included."""
    found, stack = {start}, [start]
    while stack:
        fresh = (set(graph.get(stack.pop(), ())) & allowed) - found
        found |= fresh
        stack.extend(fresh)
    return found


def strong_components(graph: Mapping[Node, Collection[Node]]) -> Iterator[set[Node]]:
    """The sets of nodes that all reach each other (Kosaraju's algorithm)."""
    backwards: dict[Node, list[Node]] = defaultdict(list)
    for node, targets in graph.items():
        for target in targets:
            backwards[target].append(node)
    order = finishing_order(graph)
    left = set(order)
    for node in reversed(order):
        if node in left:
            component = reachable(backwards, node, left)
            left -= component
            yield component


def path_around(
    graph: Mapping[Node, Collection[Node]], start: Node, end: Node, allowed: set[Node]
) -> list[Node] | None:
    """The shortest path of at least two steps between two different allowed nodes, or `None`."""
    before: dict[Node, Node] = {}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        for target in graph.get(node, ()):
            if target not in allowed or target in before or target == start or (node, target) == (start, end):
                continue
            before[target] = node
            if target == end:
                path = [end]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            queue.append(target)
    return None


def cycles(graph: Mapping[Node, Collection[Node]]) -> Iterator[list[Node]]:
    """One cycle of at least three nodes from every strong component that has one, as the list of its nodes.

    Two nodes that point at each other are no cycle here: that is a contradiction, which is counted by itself.
    """
    for component in strong_components(graph):
        if len(component) > 2:
            # in the order of the graph: sets have another order in every process
            members = [node for node in graph if node in component]
            edges = ((node, target) for node in members for target in graph[node] if target in component)
            around = (path_around(graph, target, node, component) for node, target in edges if node != target)
            found = next((path for path in around if path), None)
            if found:
                yield found
