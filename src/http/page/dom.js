// Finds and changes elements. Data is inserted as text and attributes only, never as markup.

export const $ = (id) => document.getElementById(id);

// Writes a text only if it changes, so that a selection stays and screen readers don't repeat it.
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function set(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

export function element(name, text, attributes = {}) {
  const node = document.createElement(name);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

// Makes the children of `list` match these keys, in this order. Existing children are kept.
export function keyed(list, keys, make) {
  const old = new Map([...list.children].map((child) => [child.dataset.key, child]));
  keys.forEach((key, index) => {
    let child = old.get(key);
    old.delete(key);
    if (!child) {
      child = make(key);
      child.dataset.key = key;
    }
    if (list.children[index] !== child) list.insertBefore(child, list.children[index] ?? null);
  });
  for (const child of old.values()) child.remove();
  return [...list.children];
}

export const copy = (template) => $(template).content.firstElementChild.cloneNode(true);

export function fill(bar, share) {
  bar.firstElementChild.style.transform = `scaleX(${Math.min(1, Math.max(0, share))})`;
}
