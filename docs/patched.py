"An extension of Griffe, which reads the package for the API pages: what fastcore's `@patch` adds to a class stands in that class there."
import griffe


def patched_class(member, module) -> griffe.Class|None:
    "The class of this module that a function is patched into."
    if not member.is_function or not any(str(d.value).partition('(')[0] == 'patch' for d in member.decorators): return None
    owner = module.members.get(str(next(iter(member.parameters)).annotation))
    return owner if owner is not None and owner.is_class else None


class PatchedMethods(griffe.Extension):
    def on_module_members(self, *, mod: griffe.Module, **kwargs):
        for name, member in list(mod.members.items()):
            owner = None if member.is_alias else patched_class(member, mod)
            if owner is None: continue
            mod.del_member(name)
            owner.set_member(name, member)
