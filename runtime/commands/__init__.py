"""The verbs that run bundles, one file each: they read the command line, call the runtime or the benchmark, and print.

A new verb is one new file here and one line in this table.
"""

from fusionroute.runtime.commands.verbs import Verb

VERBS = {
    "generate": Verb("fusionroute.runtime.commands.generate:generate", "Generate text from a bundle."),
    "bench": Verb("fusionroute.runtime.commands.bench:bench", "Measure the speed and the memory of a bundle."),
    "plan": Verb("fusionroute.runtime.commands.plan:plan", "Say what fits a device, how fast it would be, and what to export."),
    "inspect": Verb("fusionroute.runtime.commands.inspect:inspect", "Show what is inside a bundle, and check its hashes."),
    "pack": Verb("fusionroute.runtime.commands.archive:pack", "Write a bundle into one file."),
    "unpack": Verb("fusionroute.runtime.commands.archive:unpack", "Write the bundle in such a file into a folder."),
    "sign": Verb("fusionroute.runtime.commands.sign:sign", "Sign a bundle, or make a key.", extra="sign"),
    "build": Verb("fusionroute.runtime.commands.build:build", "Build the TensorRT engines of a bundle on this device."),
    "add-expert": Verb("fusionroute.runtime.commands.experts:add_expert", "Add an expert to a bundle with one base."),
    "remove-expert": Verb("fusionroute.runtime.commands.experts:remove_expert", "Remove an expert from a bundle with one base."),
    "cache": Verb("fusionroute.runtime.commands.cache:cache", "Show what the cache folder holds, or clear it."),
    "chat": Verb("fusionroute.runtime.commands.chat:chat", "Talk with a bundle in the terminal."),
    "serve": Verb("fusionroute.runtime.commands.serve:serve", "Serve a bundle to OpenAI's clients.", "serve"),
}
