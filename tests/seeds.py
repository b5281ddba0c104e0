"One small good file of each annotation format, as (name, text); what the tests of bad input spoil."
import json

TURN = {'role': 'assistant', 'time': 0.0, 'content': 'First boil the water.'}
NATIVE = {'video_uid': 'tea', 'dataset': 'kitchen', 'duration': 6.0, 'steps': [{'id': 'S1', 'name': 'boil the water', 'spans': [[0, 3]]}],
          'turns': [TURN]}
DST = {'video_uid': 'toy', 'dataset': 'assembly', 'fps': 2, 'end_frame_idx': 20, 'inferred_goal': 'Assemble a toy',
       'conversation': [{'role': 'system', 'content': 'Help.'},
                        {'role': 'DST_UPDATE', 'content': [{'id': 'S1', 'transition': 'start'}], 'time': 1.0},
                        {'role': 'assistant', 'content': 'Take the wheel.', 'time': 1.0}],
       'dst': [{'type': 'step', 'id': 'S1', 'name': 'attach the wheel', 'start_ts': 1.0, 'end_ts': 4.5}]}
TREE = {'video_uid': 'car', 'inferred_goal': 'assemble a car', 'dialog': [TURN], 'dst': {'steps': [
    {'step_id': 'S1', 'name': 'attach interior', 'timestamps': {'start_ts': 1.0, 'end_ts': 2.5}},
    {'step_id': 'S2', 'name': 'attach the wheels', 'substeps': [
        {'sub_id': 'S2.1', 'name': 'front wheels', 'timestamps': {'start_ts': 3.0, 'end_ts': 6.0}, 'actions': [
            {'act_id': 'S2.1.a', 'name': 'screw the left', 'timestamps': {'start_ts': 3.0, 'end_ts': 4.0}}]}]}]}}
MAPPING = {'boil the water': {'timestamps': [1.0, 1.4, 3.0]}, 'stir': {'timestamps': []}}
TABLE = 'type\tid\tstart_ts\tend_ts\tname\nSTEP\tS1\t4.4\t53.6\tAttach interior and wheels\nsubstep\tS1.1\t4.4\t15.2\tAttach interior\n'
GENERATED = {'video_uid': 'bus', 'inferred_goal': 'assemble a bus', 'inferred_knowledge': '1. wheels', 'parsed_video_anns': {
    'dataset': 'assembly101', 'duration': 40.1, 'video_start_time': 2.0, 'all_step_descriptions': '[4.2s-9.0s] attach wheel\n - [5.0s] screw'},
    'conversations': [{'user_type': kind, 'conversation': [TURN]} for kind in ('no_talk', 'talk_some')]}
PREPARED = {'video_uid': 'truck', 'dataset': 'assembly101', 'fps': 2, 'clip_idx': 0, 'end_frame_idx': 20, 'metadata': {'user_id': 'talk_some_1'},
            'conversation': [{'role': 'system', 'content': 'Help.'}, {'role': 'frames', 'start': 11, 'end': 15},
                             {'role': 'user', 'time': 7.8, 'content': 'What now?', 'labels': ''}, {'role': 'frames', 'start': 15, 'end': 20}]}
PRINTED = '''90 video: assemble_car
[29.9s-66.2s] The user attaches the wheel.
 - [34.2s-41.0s] screw the wheel (ERROR: wrong place)
 - [30.2s] assistant: "Attach the wheel."
[71.0s] User: Done?   [responsive|feedback]
Summary: The user attaches a wheel twice.
80 ASSISTANT: Well done.
'''
HOLOASSIST = {'video_name': 'lamp', 'taskType': 'assemble lamp', 'videoMetadata': {'duration': {'raw': '00:01:02.50', 'seconds': 62}}, 'events': [
    {'label': 'Coarse grained action', 'start': 5.0, 'end': 9.0, 'attributes': {'Action sentence': 'The student takes the foot.'}},
    {'label': 'Conversation', 'start': 4.0, 'end': 5.0,
     'attributes': {'Conversation Purpose': 'instructor-start-conversation_other', 'Transcription': 'Take it.'}}]}
COOKING_STEPS = [{'step_id': 4, 'start_time': 0, 'end_time': 12.5, 'description': 'Grind the beans', 'has_errors': False},
                 {'step_id': 2, 'start_time': -1.0, 'end_time': -1.0, 'description': 'Weigh the beans', 'has_errors': True}]
COOKING = {'9_2': {'recording_id': '9_2', 'activity_id': 9, 'activity_name': 'Coffee', 'steps': COOKING_STEPS}}
COOKING_ERRORS = [{'recording_id': '9_3', 'activity_id': 9, 'is_error': True, 'step_annotations': COOKING_STEPS}]
GOALSTEP = {'version': '1.0', 'videos': [{'video_uid': 'grp-1', 'start_time': .02, 'end_time': 80., 'goal_description': 'make pastry', 'segments': [
    {'start_time': 8.0, 'end_time': 41.0, 'step_category': 'Warm the milk', 'segments': [
        {'start_time': 20.0, 'end_time': 27.0, 'step_category': 'Pour the milk'}]},
    {'start_time': 50.0, 'end_time': 72.0, 'step_category': 'Add flour', 'segments': []}]}]}
EGOEXO = [{'start': a, 'end': b, 'attribute': '7', 'duration': 60.5, 'id': 'Lz', 'type': 0, 'textAttribute_en': text}
          for a, b, text in ((8.1, 27, '1. Take out garlic.'), (47.3, 54.6, '1. Cut it.'))]
COIN = {'database': {'LtRSn': {'duration': 131.0309, 'class': 'ReplaceCDDriveWithSSD', 'start': 56.6, 'end': 85.7, 'subset': 'training', 'recipe_type': 131,
                               'annotation': [{'id': '212', 'segment': [60.0, 69.0], 'label': 'take out the laptop CD drive'}]}}}
EPIC = '''narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,verb
P01_01_0,P01,P01_01,00:00:01.089,00:00:00.14,00:00:03.37,8,202,open door,open
P01_102_0,P01,P01_102,00:00:01.100,00:00:00.54,00:00:02.23,27,111,take plate,take
'''
COARSE = '000006833\t000007554\tattempt to screw chassis\n000007554\t000007914\tattach wheel to chassis\n'
MISTAKES = "7257,7817,attach,interior,chassis,correct,\n8419,8736,detach,interior,chassis,mistake,shouldn't have happened\n"
FINE = 'id,video,start_frame,end_frame,action_id,action_cls\n7,nusar_9033/C10404_rgb.mp4,84,111,10,clap hand\n8,nusar_9033/C1.mp4,84,111,10,clap hand\n'

OBJECTS = {'a.jsonl': NATIVE, 'dst.json': DST, 'tree.json': TREE, 'mapping.json': MAPPING, 'generated.json': GENERATED, 'prepared.jsonl': PREPARED,
           'holoassist.json': HOLOASSIST, 'cooking.json': COOKING, 'errors.json': COOKING_ERRORS, 'goalstep.json': GOALSTEP, 'egoexo.json': EGOEXO,
           'coin.json': COIN}
TEXTS = {'table.tsv': TABLE, 'printed.txt': PRINTED, 'epic.csv': EPIC, 'coarse.txt': COARSE, 'mistakes.csv': MISTAKES, 'fine.csv': FINE}
FORMATS = {'a.jsonl': 'native', 'dst.json': 'DST', 'tree.json': 'DST', 'mapping.json': 'mapping', 'generated.json': 'generated dialogues',
           'prepared.jsonl': 'prepared conversations', 'holoassist.json': 'HoloAssist', 'cooking.json': 'CaptainCook4D',
           'errors.json': 'CaptainCook4D', 'goalstep.json': 'Ego4D Goal-Step', 'egoexo.json': 'EgoExoLearn', 'coin.json': 'COIN',
           'table.tsv': 'step table', 'printed.txt': 'printed timeline', 'epic.csv': 'EPIC-KITCHENS-100', 'coarse.txt': 'Assembly101',
           'mistakes.csv': 'Assembly101', 'fine.csv': 'Assembly101 fine'}

def seed_text(name: str) -> str: return TEXTS[name] if name in TEXTS else json.dumps(OBJECTS[name])
