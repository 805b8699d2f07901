// The caption editor over the tab "Train LoRA": pictures in pages, their captions, tags and undo. The server holds the
// captions and writes each edit at once (lora_trainer/api/editor.py); here is only what is on show. All text goes into
// the page as text, never as HTML.
(function() {
    "use strict";

    const ROUTES = "./lora-trainer/editor/";
    const TYPING_MS = 250;
    const WORDS = {
        keys: "Arrows move · Space selects · Enter edits · Ctrl+Enter saves, next · " +
            "Ctrl+A all · Ctrl+Z undo · / search",
        names: "No captions yet: training would use the names of files and folders. Once one picture has a caption " +
            "of its own, all should have one.",
    };

    let page = null; // the elements, while the editor is open
    let asked = null; // what the server is asked for: folder, search, page
    let view = null; // its last answer
    let current = "";
    let selected = new Set();
    let rangeStart = "";
    let chain = Promise.resolve();
    let typing = 0;
    let pictures = null;
    const sending = new Map(); // name: its caption on the way to the server
    const unsaved = new Map(); // name: its caption that could not be written

    // The other scripts of the editor may be read after this one.
    function parts() {
        return window.loraTrainerEditorParts;
    }

    function make(...given) {
        return parts().make(...given);
    }

    function button(...given) {
        return parts().button(...given);
    }

    function find(selector) {
        const root = typeof gradioApp === "function" ? gradioApp() : document;
        return root.querySelector(selector);
    }

    function counted(count, word) {
        return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
    }

    // ---- the server ----

    function headers() {
        const {pass} = find("#lora_trainer_pass [data-pass]").dataset;
        return {"Content-Type": "application/json", "X-LoRA-Trainer-Pass": pass};
    }

    async function post(route, body) {
        let response;
        try {
            response = await fetch(ROUTES + route, {method: "POST", headers: headers(), body: JSON.stringify(body)});
        } catch {
            throw new Error("The WebUI does not answer.");
        }
        const answer = await response.json().catch(() => ({errors: [`The WebUI answered ${response.status}.`]}));
        if (!response.ok) throw new Error(answer.errors.join("\n"));
        return answer;
    }

    // One request after the other, so that each edit is of what the page shows.
    function ask(route, body, done, failed) {
        chain = chain.then(async function() {
            if (!page) return;
            page.root.classList.add("lt-busy");
            try {
                const answer = await post(route, typeof body === "function" ? body() : body);
                if (!page) return;
                say("");
                show(answer);
                if (done) done(answer);
            } catch (error) {
                say(error.message, true);
                if (page && failed) failed();
                // What another program or page has written is shown before anything else is.
                if (route !== "look") await post("look", asked).then(show, () => null);
            } finally {
                if (page) page.root.classList.remove("lt-busy");
            }
        });
        return chain;
    }

    function look(changes) {
        Object.assign(asked, changes);
        return ask("look", () => asked);
    }

    // Another search shows other pictures: what was selected among the old ones is not changed unseen.
    function search(changes) {
        selected.clear();
        save();
        return look({page: 0, ...changes});
    }

    function edit(action, names, done, failed) {
        return ask("edit", () => ({look: asked, version: view.version, action, names}), done, failed);
    }

    function undo() {
        if (view && view.undo) {
            ask("undo", () => ({look: asked, version: view.version}), (answer) => say(`Taken back: ${answer.undone}`));
        }
    }

    function picture(name, size) {
        const query = new URLSearchParams({folder: asked.folder, metadata: asked.metadata, name, size});
        return [`${ROUTES}picture?${query}`, headers()];
    }

    // ---- what is on show ----

    function say(text, bad) {
        if (!page) return;
        page.error.textContent = bad ? text : "";
        page.said.textContent = bad || !text ? WORDS.keys : text;
    }

    function show(answer) {
        const before = view ? view.pictures.findIndex((one) => one.name === current) : -1;
        view = answer;
        asked.page = view.page;
        if (!view.pictures.some((one) => one.name === current)) {
            const at = Math.min(Math.max(before, 0), view.pictures.length - 1);
            current = view.pictures.length ? view.pictures[at].name : "";
        }
        showHead();
        showGrid();
        showTags();
        showCurrent();
        showScope();
    }

    function showHead() {
        page.title.textContent = view.folder;
        page.count.textContent = view.found === view.total ? counted(view.total, "picture") :
            `${view.found.toLocaleString("en")} of ${counted(view.total, "picture")}`;
        page.without.textContent = `Without caption (${view.without.toLocaleString("en")})`;
        page.without.setAttribute("aria-pressed", asked.without);
        page.undo.disabled = !view.undo;
        page.undo.title = view.undo ? `Undo: ${view.undo} (Ctrl+Z)` : "Nothing to undo";
        page.chips.replaceChildren(...asked.tags.map((tag) =>
            button(`${tag} ✕`, "Show others too", () => filter(tag), "lt-chip lt-pressed")));
        const notes = [...view.notes, ...(view.from_names ? [WORDS.names] : [])];
        page.notes.replaceChildren(...notes.slice(0, 5).map((text) => make("div", {textContent: text})));
        page.where.textContent = `Page ${view.page + 1} of ${view.pages}`;
        page.previous.disabled = view.page === 0;
        page.next.disabled = view.page + 1 >= view.pages;
    }

    function showGrid() {
        const tiles = [];
        const cells = view.pictures.map(function(one) {
            const image = make("img", {alt: "", draggable: false});
            const mark = make("span", {className: "lt-mark", title: "Select (Space)"});
            const caption = make("span", {className: one.caption ? "lt-words" : "lt-words lt-none",
                textContent: one.caption || "no caption"});
            const cell = make("div", {className: "lt-cell", title: one.name}, image, mark, caption);
            cell.dataset.name = one.name;
            cell.setAttribute("role", "option");
            cell.setAttribute("aria-label", `${one.name}: ${one.caption || "no caption"}`);
            tiles.push([one.name, image, cell]);
            return cell;
        });
        const top = page.grid.scrollTop;
        const none = asked.without && !view.without ? "Every picture has a caption." : "Nothing found.";
        const nothing = make("p", {className: "lt-nothing", textContent: none});
        page.grid.replaceChildren(...(cells.length ? cells : [nothing]));
        page.grid.scrollTop = top;
        mark();
        pictures.fill(tiles);
    }

    function mark() {
        for (const cell of page.grid.querySelectorAll(".lt-cell")) {
            cell.classList.toggle("lt-current", cell.dataset.name === current);
            cell.classList.toggle("lt-selected", selected.has(cell.dataset.name));
            cell.setAttribute("aria-selected", selected.has(cell.dataset.name));
        }
    }

    function showTags() {
        const chosen = new Set(asked.tags.map((tag) => tag.toLowerCase()));
        page.tags.replaceChildren(...view.tags.map(function([tag, count]) {
            const name = button(tag, "Show only pictures with it", () => filter(tag), "lt-tag");
            name.setAttribute("aria-pressed", chosen.has(tag.toLowerCase()));
            name.append(make("span", {textContent: count.toLocaleString("en")}));
            const pencil = button("✎", `Change or remove ${tag}`, () => take(tag), "lt-pencil");
            return make("div", {className: "lt-tag-row"}, name, pencil);
        }));
        page.order.textContent = asked.rare ? "rare first" : "common first";
    }

    function showScope() {
        const names = targets();
        page.scope.textContent = selected.size ? `In ${counted(selected.size, "selected picture")}` :
            `In all ${counted(view.found, "picture")} found`;
        page.clear.hidden = !names;
    }

    function one() {
        return view ? view.pictures.find((picture) => picture.name === current) : undefined;
    }

    function showCurrent() {
        const picture = one();
        page.detail.hidden = !picture;
        if (!picture) return;
        page.name.textContent = picture.name;
        page.home.textContent = picture.caption ? `in ${picture.home}` : `will be in ${picture.home}`;
        const other = page.caption.dataset.name !== picture.name;
        // Words being typed stay.
        if (other || page.caption.value === page.caption.dataset.saved) {
            page.caption.value = unsaved.has(picture.name) ? unsaved.get(picture.name) : picture.caption;
        }
        page.caption.dataset.name = picture.name;
        page.caption.dataset.saved = picture.caption;
        if (!other) return;
        page.large.removeAttribute("src");
        pictures.show(picture.name, page.large);
        pictures.load(picture.name, "large").then(function(url) {
            if (page && page.caption.dataset.name === picture.name) page.large.src = url;
            setTimeout(() => URL.revokeObjectURL(url), 1000);
        }, () => null);
    }

    // ---- what the user does ----

    function filter(tag) {
        const rest = asked.tags.filter((other) => other.toLowerCase() !== tag.toLowerCase());
        search({tags: rest.length < asked.tags.length ? rest : [...asked.tags, tag]});
    }

    function take(tag) {
        page.tag.value = tag;
        page.old.value = tag;
        page.any.checked = false;
        page.replacement.focus();
    }

    function targets() {
        return selected.size ? [...selected] : null;
    }

    function many(action) {
        save();
        say("Writing…");
        edit(action, targets(), (answer) => say(`Changed ${counted(answer.changed, "caption")}.`));
    }

    // Write what was typed. What could not be written stays with its picture.
    function save(done) {
        const {name, saved} = page.caption.dataset;
        const caption = page.caption.value;
        if (name === undefined || caption === saved || sending.get(name) === caption) {
            if (done) chain.then(done);
            return;
        }
        sending.set(name, caption);
        edit({kind: "write", caption}, [name], function() {
            sending.delete(name);
            unsaved.delete(name);
            if (page.caption.dataset.name === name && page.caption.value === caption) {
                page.caption.value = page.caption.dataset.saved;
            }
            if (done) done();
        }, function() {
            sending.delete(name);
            unsaved.set(name, caption);
            if (view.pictures.some((picture) => picture.name === name)) current = name;
        });
    }

    function revert() {
        unsaved.delete(page.caption.dataset.name);
        page.caption.value = page.caption.dataset.saved;
        page.grid.focus();
    }

    function saveAndGo() {
        const from = view.pictures.findIndex((picture) => picture.name === current);
        const name = current;
        save(function() {
            // A picture that is no longer found has made place for the next one.
            if (!view.pictures.some((picture) => picture.name === name)) return;
            if (from + 1 < view.pictures.length) go(from + 1);
            else if (view.page + 1 < view.pages) turn(1);
        });
    }

    function go(at, extend) {
        if (!view.pictures.length) return;
        save();
        current = view.pictures[Math.min(Math.max(at, 0), view.pictures.length - 1)].name;
        if (extend) selectRange();
        else rangeStart = current;
        mark();
        showCurrent();
        showScope();
        const cell = page.grid.querySelector(".lt-current");
        if (cell) cell.scrollIntoView({block: "nearest"});
    }

    function selectRange() {
        const names = view.pictures.map((picture) => picture.name);
        const ends = [names.indexOf(rangeStart), names.indexOf(current)].sort((a, b) => a - b);
        if (ends[0] >= 0) names.slice(ends[0], ends[1] + 1).forEach((name) => selected.add(name));
    }

    function toggle(name) {
        if (!selected.delete(name)) selected.add(name);
        mark();
        showScope();
    }

    function turn(by) {
        save();
        const to = Math.min(Math.max(view.page + by, 0), view.pages - 1);
        if (to === view.page) return;
        page.grid.scrollTop = 0;
        look({page: to}).then(() => go(by > 0 ? 0 : view.pictures.length - 1));
    }

    function clicked(event) {
        const cell = event.target.closest(".lt-cell");
        if (!cell) return;
        const at = view.pictures.findIndex((picture) => picture.name === cell.dataset.name);
        const alone = event.target.closest(".lt-mark") || event.ctrlKey || event.metaKey;
        go(at, event.shiftKey);
        if (alone && !event.shiftKey) toggle(cell.dataset.name);
    }

    function columns() {
        const cells = [...page.grid.querySelectorAll(".lt-cell")];
        return Math.max(1, cells.filter((cell) => cell.offsetTop === cells[0].offsetTop).length);
    }

    function inGrid(event) {
        const at = view.pictures.findIndex((picture) => picture.name === current);
        const steps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns()};
        const {key} = event;
        if (key in steps) {
            const to = at + steps[key];
            if (to >= view.pictures.length && key !== "ArrowUp" && view.page + 1 < view.pages) turn(1);
            else if (to < 0 && view.page > 0) turn(-1);
            else go(to, event.shiftKey);
        } else if (key === "Home") go(0, event.shiftKey);
        else if (key === "End") go(view.pictures.length - 1, event.shiftKey);
        else if (key === "PageDown") turn(1);
        else if (key === "PageUp") turn(-1);
        else if (key === " ") toggle(current);
        else if (key === "Enter") page.caption.focus();
        else return false;
        return true;
    }

    function selectAll() {
        // All of this page; all that were found need no selection.
        view.pictures.forEach((picture) => selected.add(picture.name));
        mark();
        showScope();
    }

    function clear() {
        selected.clear();
        mark();
        showScope();
    }

    function pressed(event) {
        // The WebUI has keys of its own.
        event.stopPropagation();
        if (!view || event.isComposing) return;
        const {key, target} = event;
        const control = event.ctrlKey || event.metaKey;
        const writes = target.matches("textarea, input:not([type=checkbox])");
        let done = true;
        if (key === "Enter" && control) saveAndGo();
        else if (key === "Escape" && target === page.caption) revert();
        else if (key === "Escape" && writes) page.grid.focus();
        else if (key === "Escape" && selected.size) clear();
        else if (key === "Escape") close();
        else if (writes) done = false;
        else if (control && key.toLowerCase() === "z") undo();
        else if (control && key.toLowerCase() === "a") selectAll();
        else if (key === "/") page.words.focus();
        else if ((target === page.grid || !page.root.contains(target)) && !control) done = inGrid(event);
        else done = false;
        if (done) event.preventDefault();
    }

    function type() {
        clearTimeout(typing);
        typing = setTimeout(() => page && search({words: page.words.value}), TYPING_MS);
    }

    // ---- opening ----

    function value(id) {
        const input = find(`#${id} textarea, #${id} input`);
        return input ? input.value : "";
    }

    function open() {
        if (page) return;
        page = parts().page({type, without: () => search({without: !asked.without}), undo, close, pick: clicked, turn,
            write: () => page.caption.focus(), save: saveAndGo, many, clear, order: () => look({rare: !asked.rare})});
        page.root.addEventListener("keydown", pressed);
        pictures = new (parts().Pictures)(picture);
        asked = {folder: value("lora_trainer_train_data_dir"), metadata: value("lora_trainer_metadata_path"),
            words: "", tags: [], without: false, rare: false, page: 0};
        view = null;
        current = rangeStart = "";
        selected = new Set();
        sending.clear();
        unsaved.clear();
        const container = find(".gradio-container") || document.body;
        page.beneath = [...container.children].filter((element) => !element.inert);
        page.beneath.forEach((element) => element.inert = true);
        container.append(page.root);
        document.documentElement.classList.add("lt-editing");
        say("Reading the captions…");
        page.grid.focus();
        ask("look", () => ({...asked, fresh: true}), () => page.grid.focus());
    }

    function close() {
        if (!page) return;
        const shut = function() {
            if (!page) return;
            pictures.close();
            page.root.remove();
            page.beneath.forEach((element) => element.inert = false);
            document.documentElement.classList.remove("lt-editing");
            page = null;
            const opener = find("#lora_trainer_edit");
            if (opener) opener.focus();
        };
        // What could not be saved stays on show, with the reason.
        if (view && !unsaved.size) save(shut);
        else if (!unsaved.size || confirm("Close without what could not be saved?")) shut();
    }

    // A key pressed while nothing has the focus is meant for the editor too.
    document.addEventListener("keydown", function(event) {
        if (page && !page.root.contains(event.target)) pressed(event);
    }, true);

    document.addEventListener("click", function(event) {
        if (event.target.closest && event.target.closest("#lora_trainer_edit")) open();
    });
})();
