// Shows on each of our nodes what its last run reported. ComfyUI itself draws such text on its own nodes alone.
import { app } from "../../scripts/app.js"

const PREFIX = "DiTQuant"
const WIDGET = "report_text"
const MIN_HEIGHT = 90
const WARNING = "warning: "
const STYLE = {
  boxSizing: "border-box",
  width: "100%",
  height: "100%",
  margin: "0",
  padding: "4px 6px",
  overflow: "auto",
  whiteSpace: "pre-wrap",
  overflowWrap: "anywhere",
  userSelect: "text",
  font: "11px/1.35 sans-serif",
  color: "var(--input-text, #ddd)",
  background: "var(--comfy-input-bg, #222)",
  borderRadius: "4px",
}

function addWidget(node) {
  const element = document.createElement("pre")
  Object.assign(element.style, STYLE)
  const widget = node.addDOMWidget(WIDGET, "report", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => MIN_HEIGHT,
    getValue: () => [...element.children].map((child) => child.textContent).join("\n"),
    setValue: () => {},
  })
  // what a machine said of itself goes neither into the prompt (above) nor into the workflow's file
  widget.serialize = false
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
  return widget
}

function line(text) {
  const element = document.createElement("div")
  element.textContent = text
  if (text.startsWith(WARNING)) element.style.color = "#ffb454"
  return element
}

function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n")
  const shown = node.widgets?.find((widget) => widget.name === WIDGET)
  if (!text && !shown) return
  const widget = shown ?? addWidget(node)
  widget.element.replaceChildren(...text.split("\n").map(line))
  node.setDirtyCanvas?.(true, true)
}

/** The node of an id like "7", or "<subgraph>:7" of one inside a subgraph. */
function find(id) {
  const parts = String(id).split(":")
  const root = app.rootGraph ?? app.graph
  const graph = parts.length > 1 ? root?.subgraphs?.get(parts[0]) : root
  return graph?.getNodeById(parts.at(-1))
}

app.registerExtension({
  name: "DiTQuant.Report",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith(PREFIX)) return
    const onExecuted = nodeType.prototype.onExecuted
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output)
      show(this, output)
    }
  },

  // a workflow that comes back into view has new nodes, and the outputs of its last run
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = find(id)
      if (node?.type?.startsWith(PREFIX)) show(node, output)
    }
  },
})
