// Keeps a page up to date and adds what HTML alone has not: the stream of changes, ages that grow, the filter, the
// theme, copying. It inserts nothing but HTML that the server rendered. Without it the page still shows everything.
'use strict';

(() => {
  const root = document.documentElement;
  root.classList.add('js');

  // The theme is set before anything is drawn.
  const themes = ['auto', 'light', 'dark'];
  const stored = {
    get theme() { try { return localStorage.getItem('theme'); } catch { return null; } },
    set theme(t) { try { localStorage.setItem('theme', t); } catch { /* it lasts as long as the page */ } },
  };
  const asked = new URLSearchParams(location.search).get('theme');
  if (themes.includes(asked)) stored.theme = asked;
  let theme = [asked, stored.theme, 'auto'].find((t) => themes.includes(t));
  const applyTheme = () => {
    if (theme === 'auto') delete root.dataset.theme; else root.dataset.theme = theme;
  };
  applyTheme();

  document.addEventListener('DOMContentLoaded', () => {
    const body = document.body;
    const words = (key) => body.dataset['words' + key[0].toUpperCase() + key.slice(1)];
    const byID = (id) => document.getElementById(id);

    // --- theme

    const button = byID('theme');
    const nameTheme = () => { button.textContent = words(theme); };
    button.hidden = false;
    nameTheme();
    button.addEventListener('click', () => {
      theme = themes[(themes.indexOf(theme) + 1) % themes.length];
      stored.theme = theme;
      applyTheme();
      nameTheme();
    });

    // --- ages: texts that depend on the present, which the server's clock tells

    const units = body.dataset.units.split(',');
    let offset = Date.parse(body.dataset.now) - Date.now();
    const span = (seconds) => {
      const s = Math.max(0, Math.floor(seconds));
      const steps = [86400, 3600, 60, 1];
      for (let i = 0; i < 3; i++) {
        if (s >= steps[i]) return Math.floor(s / steps[i]) + units[i] + ' ' + Math.floor(s % steps[i] / steps[i + 1]) + units[i + 1];
      }
      return s + units[3];
    };
    const age = (t) => {
      const text = span((Date.now() + offset - Date.parse(t.dateTime)) / 1000);
      const said = t.dataset.age === 'ago' ? body.dataset.ago.replace('{}', text) : text;
      if (t.textContent !== said) {
        if (t.title === '') t.title = t.dateTime;
        t.textContent = said;
      }
    };
    const ages = (within) => within.querySelectorAll('time[data-age]').forEach(age);
    ages(document);

    // --- bringing an element to what the server rendered, keeping all nodes that need not change

    const morph = (old, now) => {
      if (old.nodeName !== now.nodeName || old.nodeType !== now.nodeType) { old.replaceWith(now); return; }
      if (old.nodeType !== Node.ELEMENT_NODE) { if (old.nodeValue !== now.nodeValue) old.nodeValue = now.nodeValue; return; }
      if (old.isEqualNode(now)) return;
      for (const a of [...old.attributes]) if (!now.hasAttribute(a.name) && !(old.nodeName === 'TIME' && a.name === 'title')) old.removeAttribute(a.name);
      for (const a of now.attributes) if (old.getAttribute(a.name) !== a.value) old.setAttribute(a.name, a.value);
      if (old.nodeName === 'TIME' && 'age' in old.dataset) { old.title = old.dateTime; age(old); return; }
      let o = old.firstChild;
      for (let n = now.firstChild, next; n; n = next) {
        next = n.nextSibling;
        if (o) { const after = o.nextSibling; morph(o, n); o = after; } else old.append(n);
      }
      while (o) { const after = o.nextSibling; o.remove(); o = after; }
    };
    const parse = (html) => {
      const t = document.createElement('template');
      t.innerHTML = html;
      return t.content.firstElementChild;
    };

    // --- the fleet's rows: their order, and which are shown

    const rows = byID('rows');
    const order = (ids) => {
      const focused = document.activeElement && document.activeElement.closest('#rows > tr');
      const wanted = new Set(ids);
      for (const r of [...rows.children]) if (!wanted.has(r.id)) r.remove();
      // The row that has the focus is never moved, which would take it away: the others are put around it.
      let at = rows.firstElementChild;
      for (const id of ids) {
        const row = byID(id);
        if (!row) continue;
        if (row === focused) {
          while (at !== row) { const next = at.nextElementSibling; rows.append(at); at = next; }
        }
        if (row === at) at = at.nextElementSibling; else rows.insertBefore(row, at);
      }
    };
    const filter = byID('filter');
    const query = new URLSearchParams(location.search);
    let only = query.get('state') || '';
    const applyFilter = () => {
      if (!rows) return;
      const text = filter.value.trim().toLowerCase();
      let shown = 0;
      for (const r of rows.children) {
        const d = r.dataset;
        const hide = !(d.cluster.toLowerCase().includes(text) && (only === '' || only === d.state || (only === 'attention' && d.health !== 'ok')));
        if (r.hidden !== hide) r.hidden = hide;
        if (!hide) shown++;
      }
      byID('none').hidden = shown > 0 || rows.children.length === 0;
      for (const b of document.querySelectorAll('[data-filter]')) b.setAttribute('aria-pressed', b.dataset.filter === only);
    };
    const keepFilter = () => {
      const url = new URL(location.href);
      for (const [key, value] of [['q', filter.value.trim()], ['state', only]]) {
        if (value === '') url.searchParams.delete(key); else url.searchParams.set(key, value);
      }
      history.replaceState(null, '', url);
      languageLinks();
      applyFilter();
    };
    const languageLinks = () => {
      for (const a of document.querySelectorAll('#languages a')) {
        const to = new URL(location.href);
        to.searchParams.set('lang', new URL(a.href).searchParams.get('lang'));
        a.href = to;
      }
    };
    if (rows) {
      filter.disabled = false;
      filter.value = query.get('q') || '';
      filter.addEventListener('input', keepFilter);
      document.addEventListener('click', (e) => {
        const b = e.target.closest('[data-filter]');
        if (!b) return;
        only = only === b.dataset.filter ? '' : b.dataset.filter;
        keepFilter();
      });
      document.addEventListener('keydown', (e) => {
        const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.nodeName);
        if (e.key === '/' && !typing && !e.ctrlKey && !e.metaKey && !e.altKey) {
          e.preventDefault();
          filter.focus();
          filter.select();
        } else if (e.key === 'Escape' && e.target === filter) {
          filter.value = '';
          keepFilter();
        }
      });
      applyFilter();
    }
    languageLinks();

    // --- copying, also where the page is not from a secure place and may not write to the clipboard

    document.addEventListener('click', async (e) => {
      const b = e.target.closest('[data-copy]');
      if (!b) return;
      const from = byID(b.dataset.copy);
      const select = () => getSelection().selectAllChildren(from);
      let done = false;
      try {
        await navigator.clipboard.writeText(from.textContent);
        done = true;
      } catch {
        select();
        try { done = document.execCommand('copy'); } catch { /* selected it is */ }
      }
      byID('copied').textContent = words(done ? 'copied' : 'selected');
    });

    // --- the stream

    if (!body.dataset.events) return;
    const lost = byID('lost');
    const liveTime = byID('live-time');
    const clock = (iso) => new Date(iso).toISOString().slice(0, 19).replace('T', ' ') + ' UTC';
    let shown = body.dataset.now; // the time of what the page shows
    let source = null, silence = 0, retry = 0, pause = 500, warn = 0;

    const say = (live) => {
      if (root.dataset.live !== live) {
        root.dataset.live = live;
        byID('live-words').textContent = words(live);
      }
      lost.hidden = live !== 'lost';
      const t = lost.querySelector('time');
      if (live === 'lost' && t.dateTime !== shown) { t.dateTime = shown; t.textContent = clock(shown); }
    };
    const alive = () => {
      clearTimeout(silence);
      clearTimeout(warn);
      warn = 0;
      silence = setTimeout(broken, 30000);
      pause = 500;
      say('live');
    };
    const close = () => {
      clearTimeout(silence);
      clearTimeout(retry);
      if (source) source.close();
      source = null;
    };
    const broken = () => {
      close();
      if (!warn) warn = setTimeout(() => say('lost'), root.dataset.live === 'lost' ? 0 : 1000);
      retry = setTimeout(open, pause * (0.75 + Math.random() / 2));
      pause = Math.min(pause * 2, 10000);
    };
    const update = (u) => {
      if (u.build !== body.dataset.build) { location.reload(); return; } // another walfleet, with another script
      offset = Date.parse(u.time) - Date.now();
      for (const [id, html] of Object.entries(u.fragments)) {
        const old = byID(id);
        if (old) morph(old, parse(html));
        else if (rows && html.startsWith('<tr')) rows.append(parse(html));
        else continue;
        ages(byID(id));
      }
      if (u.order && rows) order(u.order);
      if (rows) applyFilter();
      const head = byID('headline');
      if (head.dataset.title && document.title !== head.dataset.title) document.title = head.dataset.title;
      const icon = byID('icon');
      const href = icon.dataset[head.dataset.health];
      if (href && icon.getAttribute('href') !== href) icon.setAttribute('href', href);
      showCopy();
    };
    const tell = (iso) => {
      shown = iso;
      liveTime.dateTime = iso;
      liveTime.textContent = clock(iso);
    };
    const open = () => {
      close();
      silence = setTimeout(broken, 30000);
      source = new EventSource(body.dataset.events);
      source.onmessage = (e) => {
        const u = JSON.parse(e.data);
        alive();
        tell(u.time);
        update(u);
      };
      source.addEventListener('beat', (e) => {
        alive();
        tell(JSON.parse(e.data).time);
      });
      source.onerror = broken;
    };
    const showCopy = () => { const copy = byID('copy'); if (copy && copy.hidden) copy.hidden = false; };
    showCopy();
    say('connecting');
    open();

    setInterval(() => { ages(document); }, 1000);

    // A browser has few connections for each server. A cluster's page that nobody sees gives its own back; the
    // fleet's keeps it, since its title and icon are seen.
    document.addEventListener('visibilitychange', () => {
      if (body.dataset.page !== 'cluster') return;
      if (document.hidden) { close(); clearTimeout(warn); warn = 0; say('paused'); } else if (!source) { say('connecting'); open(); }
    });
    addEventListener('pagehide', close);
    addEventListener('pageshow', (e) => { if (e.persisted) open(); });
  });
})();
