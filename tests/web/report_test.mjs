// What web/report.js does with the frontend, which is played here: test_report.py lays both beside each other.
import assert from "node:assert/strict"
import { test } from "node:test"

class Element {
  style = {}
  children = []
  textContent = ""
  replaceChildren(...children) {
    this.children = children
  }
}
globalThis.document = { createElement: () => new Element() }

const { app, extensions } = await import("./scripts/app.js")
await import("./extensions/pack/report.js")
const [extension] = extensions

function nodeType(name) {
  class Node {
    type = name
    size = [320, 100]
    widgets = [{ name: "preset" }]
    drawn = 0
    addDOMWidget(name, kind, element, options) {
      const widget = { name, kind, element, options }
      this.widgets.push(widget)
      return widget
    }
    computeSize() {
      return [200, 60 + this.widgets.length * 50]
    }
    setSize(size) {
      this.size = size
    }
    setDirtyCanvas() {
      this.drawn += 1
    }
    onExecuted(output) {
      this.seen = output
    }
  }
  extension.beforeRegisterNodeDef(Node, { name })
  return Node
}

const report = (node) => node.widgets.find((widget) => widget.name === "report_text")
const lines = (node) => report(node)?.options.getValue().split("\n")

test("there is one extension", () => assert.equal(extensions.length, 1))

test("the text of a run is shown, and what others do with the output is still done", () => {
  const node = new (nodeType("DiTQuantQuantize"))()
  const output = { text: ["29 layers\nfamily SD3"], images: [1] }
  node.onExecuted(output)
  assert.equal(node.seen, output)
  assert.deepEqual(lines(node), ["29 layers", "family SD3"])
  assert.ok(node.drawn > 0)
})

test("the next run replaces it, in the same widget", () => {
  const node = new (nodeType("DiTQuantQuantize"))()
  node.onExecuted({ text: ["first"] })
  node.onExecuted({ text: ["second"] })
  assert.equal(node.widgets.length, 2)
  assert.deepEqual(lines(node), ["second"])
  node.onExecuted({})
  assert.deepEqual(lines(node), [""])
})

test("a node without text gets no widget", () => {
  const node = new (nodeType("DiTQuantLoadEmoji"))()
  for (const output of [undefined, null, {}, { images: [1] }]) node.onExecuted(output)
  assert.equal(report(node), undefined)
})

test("nodes of others are left alone", () => {
  const node = new (nodeType("KSampler"))()
  node.onExecuted({ text: ["not ours"] })
  assert.equal(report(node), undefined)
  assert.deepEqual(node.seen, { text: ["not ours"] })
})

test("warnings, and only they, have a colour of their own", () => {
  const node = new (nodeType("DiTQuantLoad"))()
  node.onExecuted({ text: ["29 layers\nwarning: slower\nno warning: here"] })
  assert.deepEqual(
    report(node).element.children.map((child) => Boolean(child.style.color)),
    [false, true, false],
  )
})

test("text stays text", () => {
  const node = new (nodeType("DiTQuantLoad"))()
  node.onExecuted({ text: ["<img src=x onerror=alert(1)>"] })
  const [child] = report(node).element.children
  assert.equal(child.textContent, "<img src=x onerror=alert(1)>")
  assert.equal(child.innerHTML, undefined)
})

test("neither the prompt nor the saved workflow gets it", () => {
  const node = new (nodeType("DiTQuantQuantize"))()
  node.onExecuted({ text: ["29 layers"] })
  assert.equal(report(node).options.serialize, false)
  assert.equal(report(node).serialize, false)
})

test("a node grows where it must, and never shrinks", () => {
  const small = new (nodeType("DiTQuantQuantize"))()
  small.onExecuted({ text: ["29 layers"] })
  assert.deepEqual(small.size, [320, 160])
  const large = new (nodeType("DiTQuantQuantize"))()
  large.size = [500, 700]
  large.onExecuted({ text: ["29 layers"] })
  assert.deepEqual(large.size, [500, 700])
})

test("a workflow that comes back shows its last reports, inside subgraphs too", () => {
  const [outer, inner, foreign] = ["DiTQuantLoad", "DiTQuantQuantize", "PreviewAny"].map(
    (name) => new (nodeType(name))(),
  )
  const graph = (nodes) => ({ getNodeById: (id) => nodes[id] })
  app.rootGraph = { ...graph({ 7: outer, 8: foreign }), subgraphs: new Map([["0a-b", graph({ 7: inner })]]) }
  extension.onNodeOutputsUpdated({
    7: { text: ["outer"] },
    "0a-b:7": { text: ["inner"] },
    8: { text: ["foreign"] },
    9: { text: ["gone"] },
    "no-such:7": { text: ["gone"] },
  })
  assert.deepEqual([lines(outer), lines(inner), report(foreign)], [["outer"], ["inner"], undefined])
})
