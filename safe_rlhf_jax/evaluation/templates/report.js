// Filters and searches the sample responses. Without scripts all of them are shown.
const cards = [...document.querySelectorAll(".answers")];
const choice = document.getElementById("choice"), words = document.getElementById("words");
const count = document.getElementById("count");

function update() {
  const [what, value] = choice.value.split(/:(.*)/s);
  const wanted = words.value.toLowerCase().trim();
  for (const card of cards) {
    const tags = JSON.parse(card.dataset.tags);
    const fits = { all: true, picked: card.dataset.picked === "yes", tag: tags.includes(value),
                   kind: card.dataset.kind === value }[what];
    card.hidden = !(fits && card.textContent.toLowerCase().includes(wanted));
  }
  count.textContent = `${cards.filter((card) => !card.hidden).length} of ${cards.length} prompts`;
}

document.getElementById("controls").hidden = false;
choice.addEventListener("change", update);
words.addEventListener("input", update);
update();
