"""A page that explore.py made, open in a real browser."""

import shutil
import time
from io import BytesIO

from PIL import Image

BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

PLACE = """
const [i] = arguments
const map = [...Bokeh.documents[0]._all_models.values()].find((m) => m.type == "Figure")
const view = Bokeh.index.find_one_by_id(map.id)
const data = map.renderers[0].data_source.data
const box = view.canvas_view.el.getBoundingClientRect()
return [box.left + view.frame.x_scale.compute(data.x[i]),
        box.top + view.frame.y_scale.compute(data.y[i])]
"""
NODES = """
function* below(node) {
    yield node
    if (node.shadowRoot) yield* below(node.shadowRoot)
    for (const child of node.childNodes) yield* below(child)
}
const nodes = [...below(document.body)]
"""
TEXTS = f"""{NODES}
const hidden = ["SCRIPT", "STYLE"]
return nodes.filter((n) => n.nodeType == Node.TEXT_NODE && !hidden.includes(n.parentNode.nodeName))
    .map((n) => n.textContent).join("\\n")
"""
ELEMENTS = f"{NODES} return nodes.filter((n) => n.nodeName == arguments[0])"
LEGEND = f"{NODES} return nodes.filter((n) => n.classList?.contains('bk-item'))"


class Page:
    """A page that is open in Chromium, and what a person does with it."""

    def __init__(self, file):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.add_argument("--window-size=1400,1000")
        options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")  # no network for this page
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            self.driver.get(file.as_uri())
            self.wait(lambda: "of" in self.text() and self.place(0))
        except BaseException:
            self.driver.quit()
            raise

    def wait(self, holds):
        """Until something holds, for ten seconds."""
        for _ in range(100):
            try:
                if found := holds():
                    return found
            except Exception as error:  # not there yet
                self.error = error
            time.sleep(0.1)
        raise AssertionError(f"waited in vain; the page says {self.text()}")

    def text(self):
        return self.driver.execute_script(TEXTS)

    def place(self, i):
        return self.driver.execute_script(PLACE, i)

    def point(self, i, click=False):
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver)
        pointer = actions.w3c_actions.pointer_action
        x, y = map(round, self.place(i))
        pointer.move_to_location(x - 2, y)
        pointer.move_to_location(x, y)
        if click:
            pointer.click()
        actions.perform()

    def away(self):
        """Point at nothing."""
        from selenium.webdriver.common.action_chains import ActionChains

        actions = ActionChains(self.driver)
        actions.w3c_actions.pointer_action.move_to_location(2, 2)
        actions.perform()

    def elements(self, name):
        return self.driver.execute_script(ELEMENTS, name)

    def screenshot(self):
        """What is on the screen, as an RGB image."""
        return Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")

    def errors(self):
        return [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
